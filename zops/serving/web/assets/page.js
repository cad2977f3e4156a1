// The page: brings its parts together.

import { openAlbum } from "./album.js";
import { fileOf, getInfo, makeImages, useKey } from "./api.js";
import { askDeleteAll, askKey } from "./dialogs.js";
import { at } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Lightbox } from "./lightbox.js";
import { Stage } from "./stage.js";
import { StateWatch } from "./state.js";
import { beginTexts } from "./texts.js";
import { Wish } from "./wish.js";

beginTexts();
const wish = new Wish();
const stage = new Stage();
const gallery = new Gallery(await openAlbum(), (picture) => lightbox.open(picture));
const lightbox = new Lightbox(() => gallery.pictures, {
  edit: (picture) => wish.edit(picture),
  reuse: (picture) => {
    wish.beginWith(null);
    wish.reuse(picture);
  },
  reuseSeed: (picture) => wish.reuseSeed(picture),
  remove: (picture) => gallery.remove(picture),
});

let limited = false;
let making = null;
const watch = new StateWatch((state) => {
  if (making) stage.wait(state?.queue.waiting ?? 0);
  else stage.rest(state);
  // Asked for once, and again after the server was away: it may be another one then.
  if (!state) limited = false;
  else if (!limited) {
    limited = true;
    getInfo().then(
      ({ limits }) => wish.limit(limits),
      () => (limited = false),
    );
  }
});

/** Have a wish made, and show it from its first preview to its end. */
async function generate(wished) {
  if (making) return;
  busy(new AbortController());
  stage.begin(wished);
  let again = null;
  try {
    for await (const event of makeImages(wished, making.signal)) {
      if (event.type.endsWith(".completed")) await complete(event, wished);
      else stage.preview(event);
    }
    stage.finish();
  } catch (error) {
    if (error.name === "AbortError") stage.cancel();
    else if (error.status === 401) again = error;
    else stage.fail(error, () => generate(wished));
  } finally {
    busy(null);
  }
  if (again) await retryWithKey(again, wished);
}

async function complete(event, { source, ...asked }) {
  const picture = await gallery.add({ file: fileOf(event), wish: asked, receipt: event.receipt });
  stage.complete(event, picture, (shown) => lightbox.open(shown));
}

async function retryWithKey(error, wished) {
  stage.clear();
  const key = await askKey(error.message);
  if (key) {
    useKey(key);
    await generate(wished);
  } else {
    stage.fail(error, () => generate(wished));
  }
}

function busy(controller) {
  making = controller;
  watch.eager = Boolean(making);
  watch.look();
  const [shown, hidden] = making ? ["cancel", "generate"] : ["generate", "cancel"];
  const focused = document.activeElement === at(hidden);
  at(hidden).hidden = true;
  at(shown).hidden = false;
  if (focused) at(shown).focus();
}

at("wish").addEventListener("submit", (event) => {
  event.preventDefault();
  generate(wish.read());
});
at("cancel").addEventListener("click", () => making?.abort());
at("deleteAll").addEventListener("click", async () => {
  if (await askDeleteAll(gallery.pictures.length)) gallery.clear();
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("wish").requestSubmit(at("generate"));
  if (event.key !== "Escape") return;
  if (at("state").open) at("state").open = false;
  else making?.abort();
});
if (/Mac|iPhone|iPad/.test(navigator.platform)) at("shortcut").textContent = "⌘ ↵";
// Not earlier: what is pressed before there is somebody to hear it would be lost without a word.
at("generate").disabled = false;

await gallery.load();
watch.look();
