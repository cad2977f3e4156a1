// The server's API as the page uses it. Paths are relative, so the page works beneath a proxy's prefix as well.

import { readEvents } from "./events.js";
import { text } from "./texts.js";

const PREVIEWS = 3;
const STORED_KEY = "zops-key";

/** What the server answered instead of an image, or why there was no answer. */
export class ApiError extends Error {
  constructor({ message, code, request_id: requestId, param }, status = 0, retryAfterS = 0) {
    super(message);
    Object.assign(this, { code, requestId, param, status, retryAfterS });
  }
}

/** Use an API key from now on, until the tab is closed. */
export const useKey = (key) => sessionStorage.setItem(STORED_KEY, key);

/** Return what is served, how, and within which limits. */
export const getInfo = async () => (await call("v1/zops/info")).json();

/** Return the state of the server, ready or not. */
export async function getState() {
  const response = await reach("readyz");
  return response.json();
}

/** How many previews a request for an image gets: the first and the last forward have none. */
export const previewsOf = (forwards) => Math.min(PREVIEWS, Math.max(0, forwards - 2));

/**
 * Yield the events of images while they are made. Aborting the signal cancels them on the server.
 *
 * A wish with a source is an edit of it.
 */
export async function* makeImages({ source, ...fields }, signal) {
  const asked = { ...fields, stream: true, partial_images: PREVIEWS };
  const response = source
    ? await call("v1/images/edits", { method: "POST", body: formOf(asked, source), signal })
    : await call("v1/images/generations", {
        method: "POST",
        body: JSON.stringify(asked),
        headers: { "Content-Type": "application/json" },
        signal,
      });
  let completed = 0;
  try {
    for await (const event of readEvents(response.body)) {
      if (event.error) throw new ApiError(event.error);
      completed += event.type.endsWith(".completed");
      yield event;
    }
  } catch (error) {
    throw error instanceof ApiError || error.name === "AbortError" ? error : connectionLost(response);
  }
  if (completed < fields.n) throw connectionLost(response);
}

/** Return the file that is in an event. */
export function fileOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

function formOf(fields, source) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  form.append("image", source, "image");
  return form;
}

async function call(path, options = {}) {
  const response = await reach(path, options);
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function reach(path, options = {}) {
  const key = sessionStorage.getItem(STORED_KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : connectionLost();
  }
}

async function errorOf(response) {
  const retryAfterS = Number(response.headers.get("Retry-After")) || 0;
  const requestId = response.headers.get("X-Request-ID");
  // A proxy in between answers in words of its own.
  const proxys = { message: `${response.status} ${response.statusText}`, code: "unknown", request_id: requestId };
  const { error } = await response.json().catch(() => ({ error: proxys }));
  return new ApiError(error ?? proxys, response.status, retryAfterS);
}

function connectionLost(response) {
  const requestId = response?.headers.get("X-Request-ID");
  return new ApiError({ message: text("unreachable"), code: "connection_lost", request_id: requestId });
}
