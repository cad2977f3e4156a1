// Server-sent events over fetch: EventSource can neither POST nor be given an API key.

/** Yield the data of each event of a body, as read from JSON; comments are passed over. */
export async function* readEvents(body) {
  let rest = "";
  // Without an end in what was searched, only its last letter can be part of one.
  let searched = 0;
  for await (const piece of pieces(body)) {
    rest += piece;
    for (let end; (end = rest.indexOf("\n\n", searched)) >= 0; searched = 0) {
      const data = dataOf(rest.slice(0, end));
      rest = rest.slice(end + 2);
      if (data) yield JSON.parse(data);
    }
    searched = Math.max(0, rest.length - 1);
  }
}

function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

// Not every browser can iterate over a stream itself.
async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let read; !(read = await reader.read()).done; ) yield read.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
