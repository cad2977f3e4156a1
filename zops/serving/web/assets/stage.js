// The stage: what is being made, with its progress, or why nothing is.

import { fileOf, previewsOf } from "./api.js";
import { at, make } from "./dom.js";
import { copyOf, hush, say } from "./texts.js";
import { showPhases, showReason } from "./state.js";

const TICK_MS = 100;

/** Shows one making after the other; its area keeps its size, whatever it shows. */
export class Stage {
  constructor() {
    this.view = "";
    this.tiles = [];
    this.rest();
  }

  /** Show that nothing is being made; `state` of the server tells whether anything could be. */
  rest(state = { phase: "ready" }) {
    // What was made, or why it was not, stays until the next making.
    if (this.view === "tiles" || this.view === "fault") return;
    if (state?.phase === "ready") {
      if (this.view !== "empty") this.turnTo("empty", copyOf("emptyView")[0]);
      return;
    }
    if (this.view !== "loading") {
      const [view, part] = copyOf("loadingView");
      this.part = part;
      this.turnTo("loading", view);
    }
    showReason(this.part("title"), this.part("reason"), state);
    if (state) showPhases(this.part("phases"), state);
    this.part("phases").hidden = !state || state.phase === "draining";
  }

  /** Show that a wish was sent. */
  begin(wish) {
    const [width, height] = wish.size.split("x");
    this.previews = previewsOf(wish.num_inference_steps);
    this.tiles = Array.from({ length: wish.n }, () => new Tile(width / height));
    const grid = make("div", { className: "tiles" }, ...this.tiles.map((tile) => tile.button));
    grid.dataset.count = wish.n;
    this.turnTo("tiles", grid);
    this.began = performance.now();
    this.timer = setInterval(() => this.tick(), TICK_MS);
    this.tick();
    say(at("said"), "sent");
    this.advance();
    at("stage").scrollIntoView({ block: "nearest" });
  }

  /** Say how many requests wait, as long as nothing else is known. */
  wait(waiting) {
    if (this.tiles.some((tile) => tile.progress)) return;
    if (waiting) say(at("said"), "sentWaiting", { waiting });
    else say(at("said"), "sent");
  }

  /** Show a preview. */
  preview(event) {
    const index = event.partial_image_index + 1;
    this.tiles[event.image_index].show(URL.createObjectURL(fileOf(event)), index / (this.previews + 1));
    if (this.tiles.length === 1) say(at("said"), "preview", { index, count: this.previews });
    this.advance();
  }

  /** Show a finished picture; `open` is called when it is chosen. */
  complete(event, picture, open) {
    this.tiles[event.image_index].finish(picture, open);
    const done = this.tiles.filter((tile) => tile.done).length;
    if (done < this.tiles.length) say(at("said"), "pictureDone", { done, all: this.tiles.length });
    this.advance();
  }

  /** Show that all is made. */
  finish() {
    this.stop("done");
  }

  /** Show what was made before it was cancelled. */
  cancel() {
    this.stop("cancelled");
    const made = this.tiles.filter((tile) => tile.done);
    if (made.length) this.tiles.filter((tile) => !tile.done).forEach((tile) => tile.button.remove());
    else this.clear();
  }

  /** Show nothing. */
  clear() {
    this.stop();
    this.turnTo("empty", copyOf("emptyView")[0]);
  }

  /** Show why there is no image; `again` is called when another try is asked for. */
  fail(error, again) {
    this.stop();
    const [view, part] = copyOf("faultView");
    this.turnTo("fault", view);
    part("message").textContent = error.message;
    part("code").textContent = error.code;
    part("request").textContent = error.requestId ?? "–";
    part("again").hidden = isFinal(error);
    part("again").addEventListener("click", again);
    this.countDown(part("again"), error.retryAfterS);
  }

  countDown(button, seconds) {
    button.disabled = seconds > 0;
    if (!button.disabled) {
      say(button, "again");
      return;
    }
    say(button, "againIn", { seconds });
    // Gone with the view, it stops.
    setTimeout(() => button.isConnected && this.countDown(button, seconds - 1), 1000);
  }

  turnTo(name, view) {
    this.view = name;
    this.tiles.forEach((tile) => tile.forget());
    if (name !== "tiles") this.tiles = [];
    at("stage").dataset.view = name;
    at("canvas").replaceChildren(view);
  }

  stop(said) {
    clearInterval(this.timer);
    if (said) say(at("said"), said);
    else hush(at("said"));
    if (!said) at("elapsed").textContent = "";
  }

  advance() {
    at("progress").value = this.tiles.reduce((sum, tile) => sum + tile.progress, 0) / this.tiles.length;
  }

  tick() {
    at("elapsed").textContent = `${((performance.now() - this.began) / 1000).toFixed(1)} s`;
  }
}

/** Tell whether the same request would be answered the same again. */
const isFinal = ({ status }) => status >= 400 && status < 500 && ![401, 408, 429].includes(status);

/** One picture of a making. */
class Tile {
  constructor(ratio) {
    this.progress = 0;
    this.image = make("img", { alt: "", hidden: true });
    const frame = make("span", { className: "frame" }, this.image);
    frame.style.setProperty("--ratio", ratio);
    this.button = make("button", { type: "button", className: "tile", disabled: true }, frame);
  }

  get done() {
    return this.progress === 1;
  }

  show(url, progress) {
    this.forget();
    this.passing = url;
    this.progress = progress;
    Object.assign(this.image, { src: url, hidden: false });
  }

  finish(picture, open) {
    this.forget();
    this.progress = 1;
    Object.assign(this.image, { src: picture.url, alt: picture.wish.prompt, hidden: false });
    Object.assign(this.button, { disabled: false, onclick: () => open(picture) });
    this.button.classList.add("done");
  }

  /** Let go of the preview. */
  forget() {
    if (this.passing) URL.revokeObjectURL(this.passing);
    this.passing = null;
  }
}
