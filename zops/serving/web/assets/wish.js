// The form: what is wished for, within the limits of the server.

import { at, make } from "./dom.js";
import { text } from "./texts.js";

const MULTIPLE = 16;
// Of the model's own size, 1024 x 1024; scaled for a server whose largest image is smaller.
const PRESETS = { "1:1": [1024, 1024], "4:3": [1152, 864], "3:4": [864, 1152], "16:9": [1280, 720], "9:16": [720, 1280] };
const PRESET_EDGE = 1024;

/** Reads and fills the form. */
export class Wish {
  constructor() {
    this.form = at("wish");
    this.limits = { max_pixels: Infinity, default_size: PRESET_EDGE };
    this.source = null;
    this.offerPresets();
    for (const edge of ["width", "height"]) at(edge).addEventListener("input", () => this.checkSize());
    at("guidance").addEventListener("input", () => this.checkNegative());
    at("strength").addEventListener("input", () => (at("strengthValue").value = at("strength").value));
    at("removeSource").addEventListener("click", () => this.beginWith(null));
    at("file").addEventListener("change", () => {
      this.beginWith(at("file").files[0] ?? null);
      at("file").value = "";
    });
    this.takeDroppedFiles();
  }

  /** Take over what the server allows and what it would fill in; what was changed already stays. */
  limit(limits) {
    this.limits = limits;
    at("n").max = limits.max_images;
    const own = { forwards: limits.forwards, guidance: limits.guidance_scale };
    for (const edge of ["width", "height"]) own[edge] = limits.default_size;
    for (const [name, value] of Object.entries(own)) {
      const field = at(name);
      if (field.value === field.defaultValue) field.value = value;
      field.defaultValue = value;
    }
    this.offerPresets();
    this.checkNegative();
  }

  /** Return what is wished for, as the API names it; `source` is the image to begin with. */
  read() {
    const number = (name) => Number(at(name).value);
    const guidance = number("guidance");
    return {
      prompt: at("prompt").value,
      n: number("n"),
      size: `${number("width")}x${number("height")}`,
      num_inference_steps: number("forwards"),
      guidance_scale: guidance,
      ...(at("seed").value && { seed: number("seed") }),
      ...(guidance > 0 && at("negative").value.trim() && { negative_prompt: at("negative").value }),
      ...(this.source && { strength: number("strength"), source: this.source }),
    };
  }

  /** Fill in what a picture was made with, its seed included; the same again gives the same picture. */
  reuse({ wish, receipt }) {
    at("prompt").value = wish.prompt;
    at("forwards").value = wish.num_inference_steps;
    at("guidance").value = wish.guidance_scale;
    at("negative").value = wish.negative_prompt ?? "";
    at("more").open ||= Boolean(wish.negative_prompt);
    at("n").value = 1;
    this.resize(receipt.width, receipt.height);
    this.reuseSeed({ receipt });
    this.checkNegative();
    at("prompt").focus();
  }

  /** Fill in the seed of a picture. */
  reuseSeed({ receipt }) {
    at("seed").value = receipt.seed;
    at("seed").focus();
  }

  /** Begin with a picture and its prompt. Not with its seed: the same noise over it again makes it worse. */
  edit({ wish, file }) {
    at("prompt").value = wish.prompt;
    this.beginWith(file);
  }

  /** Begin with an image, or with none. */
  async beginWith(file) {
    this.source = file;
    at("chosen").hidden = !file;
    at("choose").hidden = Boolean(file);
    URL.revokeObjectURL(at("thumbnail").src);
    if (!file) {
      at("thumbnail").removeAttribute("src");
      at("file").focus();
      return;
    }
    at("thumbnail").src = URL.createObjectURL(file);
    at("prompt").focus();
    try {
      await at("thumbnail").decode();
    } catch {
      return; // The server will say what is wrong with it.
    }
    if (this.source === file) this.resize(...fit(at("thumbnail"), this.limits.max_pixels));
  }

  resize(width, height) {
    at("width").value = width;
    at("height").value = height;
    this.checkSize();
  }

  checkSize() {
    const [width, height] = [Number(at("width").value), Number(at("height").value)];
    const { max_pixels: most } = this.limits;
    const edge = Math.floor(Math.sqrt(most) / MULTIPLE) * MULTIPLE;
    at("width").setCustomValidity(width * height > most ? text("tooManyPixels", { most, edge }) : "");
    for (const radio of at("presets").querySelectorAll("input")) radio.checked = radio.value === `${width}x${height}`;
  }

  checkNegative() {
    at("negative").disabled = !(Number(at("guidance").value) > 0);
  }

  offerPresets() {
    const scale = Math.min(1, this.limits.default_size / PRESET_EDGE);
    const choices = Object.entries(PRESETS).map(([ratio, edges]) => {
      const [width, height] = edges.map((edge) => Math.max(1, Math.floor((edge * scale) / MULTIPLE)) * MULTIPLE);
      const radio = make("input", { type: "radio", name: "preset", value: `${width}x${height}`, className: "visually-hidden" });
      radio.addEventListener("change", () => this.resize(width, height));
      const glyph = make("span", { className: "glyph" });
      glyph.style.aspectRatio = ratio.replace(":", " / ");
      return make("label", { title: `${width}×${height}` }, radio, glyph, ratio);
    });
    at("presets").replaceChildren(...choices);
    this.checkSize();
  }

  takeDroppedFiles() {
    this.form.addEventListener("dragover", (event) => event.preventDefault());
    this.form.addEventListener("drop", (event) => {
      const file = [...event.dataTransfer.files].find(({ type }) => type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.beginWith(file);
    });
  }
}

/** Return the size nearest to an image's own that the server makes. */
function fit({ naturalWidth, naturalHeight }, maxPixels) {
  const scale = Math.min(1, Math.sqrt(maxPixels / (naturalWidth * naturalHeight)));
  const round = scale < 1 ? Math.floor : Math.round;
  return [naturalWidth, naturalHeight].map((edge) => Math.max(1, round((edge * scale) / MULTIPLE)) * MULTIPLE);
}
