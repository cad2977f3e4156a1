// The gallery: this browser's pictures as a grid, newest first.

import { MOST } from "./album.js";
import { at, make } from "./dom.js";
import { say } from "./texts.js";

/** The pictures as they are shown: those of the album, each with the `url` of its file. */
export class Gallery {
  /** `open` is called with a picture that was chosen. */
  constructor(album, open) {
    this.album = album;
    this.open = open;
    this.lasting = album.lasting;
    this.pictures = [];
  }

  /** Show what the album has from earlier. */
  async load() {
    for (const picture of await this.album.all()) this.show(picture);
    this.tell();
  }

  /** Keep a new picture, show it, and return it as it is shown. */
  async add(picture) {
    let id;
    try {
      id = await this.album.add(picture);
    } catch {
      // No space left, or the storage was taken away: it is here until the page is left.
      this.lasting = false;
      id = `passing-${Date.now()}-${picture.receipt.seed}`;
    }
    const shown = this.show({ ...picture, id });
    this.pictures.slice(MOST).forEach((old) => this.hide(old));
    this.tell();
    return shown;
  }

  /** Forget a picture. */
  async remove(picture) {
    await this.album.remove(picture.id);
    this.hide(picture);
    this.tell();
  }

  /** Forget all pictures. */
  async clear() {
    await this.album.clear();
    [...this.pictures].forEach((picture) => this.hide(picture));
    this.tell();
  }

  show(picture) {
    const url = URL.createObjectURL(picture.file);
    const image = make("img", { src: url, alt: picture.wish.prompt, loading: "lazy", decoding: "async" });
    const shown = { ...picture, url };
    const button = make("button", { type: "button", onclick: () => this.open(shown) }, image);
    shown.item = make("li", {}, button);
    this.pictures.unshift(shown);
    at("pictures").prepend(shown.item);
    return shown;
  }

  hide(picture) {
    this.pictures = this.pictures.filter((other) => other !== picture);
    picture.item.remove();
    URL.revokeObjectURL(picture.url);
  }

  tell() {
    const count = this.pictures.length;
    say(at("count"), "count", { count, most: MOST });
    at("count").hidden = at("deleteAll").hidden = count === 0;
    at("galleryNote").hidden = count > 0 && this.lasting;
    say(at("galleryNote"), this.lasting ? "galleryEmpty" : "galleryLost");
  }
}
