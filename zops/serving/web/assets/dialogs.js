// Questions that must be answered before something goes on.

import { at } from "./dom.js";
import { say } from "./texts.js";

/** Ask for an API key, saying why; return it, or null when none is given. */
export function askKey(why) {
  at("keyFault").textContent = why;
  at("key").value = "";
  return ask(at("keyDialog"), at("keyForm"), "submit", at("keyCancel"), () => at("key").value.trim() || null);
}

/** Ask whether all pictures may be deleted. */
export function askDeleteAll(count) {
  say(at("deleteQuestion"), "deleteQuestion", { count });
  return ask(at("deleteDialog"), at("deleteYes"), "click", at("deleteNo"), () => true);
}

// Escape closes a dialog as well, and means no.
function ask(dialog, yes, event, no, answer) {
  const asking = new AbortController();
  const { signal } = asking;
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => (asking.abort(), resolve(null)), { signal });
    no.addEventListener("click", () => dialog.close(), { signal });
    const agree = (happened) => {
      happened.preventDefault();
      resolve(answer());
      dialog.close();
    };
    yes.addEventListener(event, agree, { signal });
    dialog.showModal();
  });
}
