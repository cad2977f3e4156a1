// Loads the page again when a part of it was lost on the way: a browser drops what is under way when its network changes,
// and a page without one of its modules would say "Connecting" for ever.

{
  const MOST = 3;
  const PAUSE_MS = 1000;
  const KEY = "zops-reloads";
  let lost = false;

  // What happens to an element goes to nobody else; exceptions of a script come to the window, and are not meant.
  addEventListener("error", ({ target }) => (lost ||= target instanceof Element), true);

  addEventListener("load", () => {
    const reloads = lost ? Number(sessionStorage.getItem(KEY)) + 1 : 0;
    sessionStorage.setItem(KEY, reloads);
    if (reloads > MOST) document.getElementById("lost").hidden = false;
    else if (lost) setTimeout(() => location.reload(), PAUSE_MS * reloads);
  });
}
