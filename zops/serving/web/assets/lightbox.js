// One picture, large, with its receipt and what can be done with it.

import { at } from "./dom.js";
import { fact, hush, say } from "./texts.js";

const DIGEST_LETTERS = 12;

/** Shows pictures of the gallery in a dialog; arrow keys go on to the next. */
export class Lightbox {
  /** `actions` are {edit, reuse, reuseSeed, remove}, each called with the picture. */
  constructor(pictures, actions) {
    this.pictures = pictures;
    this.picture = null;
    const dialog = at("lightbox");
    const act = (button, action) => at(button).addEventListener("click", () => this.leave(action));
    act("editThis", actions.edit);
    act("reuse", actions.reuse);
    act("reuseSeed", actions.reuseSeed);
    at("close").addEventListener("click", () => dialog.close());
    at("previous").addEventListener("click", () => this.step(-1));
    at("next").addEventListener("click", () => this.step(1));
    at("copyReceipt").addEventListener("click", () => this.copyReceipt());
    at("deleteThis").addEventListener("click", () => this.remove(actions.remove));
    dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) this.step(step);
    });
    // A click beside the picture and its facts falls on the dialog itself.
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }

  /** Show a picture. */
  open(picture) {
    this.picture = picture;
    const { wish, receipt, url } = picture;
    const extension = picture.file.type.replace("image/", "");
    Object.assign(at("full"), { src: url, alt: wish.prompt, width: receipt.width, height: receipt.height });
    Object.assign(at("download"), {
      href: url,
      download: `zops-${receipt.seed}-${receipt.width}x${receipt.height}.${extension}`,
    });
    at("caption").textContent = wish.prompt;
    if (wish.negative_prompt) say(at("captionNegative"), "negativeShown", { text: wish.negative_prompt });
    else hush(at("captionNegative"));
    hush(at("copied"));
    at("receipt").replaceChildren(...factsOf(receipt));
    const place = this.place;
    at("previous").disabled = place === 0;
    at("next").disabled = place === this.pictures().length - 1;
    if (!at("lightbox").open) at("lightbox").showModal();
  }

  get place() {
    return this.pictures().indexOf(this.picture);
  }

  step(by) {
    const next = this.pictures()[this.place + by];
    if (next) this.open(next);
  }

  leave(action) {
    at("lightbox").close();
    action(this.picture);
  }

  async remove(action) {
    const place = this.place;
    await action(this.picture);
    const left = this.pictures();
    if (left.length) this.open(left[Math.min(place, left.length - 1)]);
    else at("lightbox").close();
  }

  async copyReceipt() {
    try {
      await navigator.clipboard.writeText(JSON.stringify(this.picture.receipt, null, 2));
      say(at("copied"), "copied");
    } catch {
      say(at("copied"), "copyFailed");
    }
  }
}

function factsOf(receipt) {
  const seconds = Object.entries(receipt.seconds ?? {});
  const facts = [
    ["seed", receipt.seed],
    ["size", `${receipt.width}×${receipt.height}`],
    ["forwards", receipt.forwards],
    ["guidance", receipt.guidance_scale],
    ["strength", receipt.strength],
    ["seconds", seconds.map(([phase, value]) => `${value.toFixed(2)} ${phase}`).join("\n")],
    ["batch", receipt.batch_size > 1 ? receipt.batch_size : null],
    ["tokens", receipt.prompt_tokens],
    ["truncated", receipt.truncated ? "✓" : null],
    ["model", receipt.model],
    ["revision", receipt.revision],
    ["manifest", receipt.manifest_digest?.slice(0, DIGEST_LETTERS)],
    ["dtype", receipt.dtype],
  ];
  return facts.flatMap(([name, value]) => (value == null || value === "" ? [] : fact(name, value)));
}
