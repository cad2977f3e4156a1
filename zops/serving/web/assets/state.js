// The state of the server, asked for every few seconds while somebody looks at the page.

import { getState } from "./api.js";
import { at, make } from "./dom.js";
import { fact, hush, say, shortDigest } from "./texts.js";

const CALM_MS = 3000;
const EAGER_MS = 1000;
const GIB = 2 ** 30;
const GOOD = "ready";
/** Phases of a start, in their order. */
export const START_PHASES = ["verify", "imports", "read", "build", "gate", "warmup"];

/** Asks for the state again and again, and shows it in the head of the page. */
export class StateWatch {
  /** `onState` is called with each state, and with null where the server cannot be reached. */
  constructor(onState) {
    this.onState = onState;
    this.state = null;
    /** Ask often, because something is being made. */
    this.eager = false;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => this.look());
    document.addEventListener("click", (event) => at("state").contains(event.target) || at("state").removeAttribute("open"));
  }

  /** Ask now, and go on asking while the page is seen. */
  async look() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    const turn = (this.turn = {});
    const state = await getState().catch(() => null);
    // Somebody asked again meanwhile: that answer counts.
    if (turn !== this.turn) return;
    this.state = state;
    show(state);
    this.onState(state);
    this.timer = setTimeout(() => this.look(), this.eager || state?.phase !== GOOD ? EAGER_MS : CALM_MS);
  }
}

function show(state) {
  const phase = state?.phase ?? "unreachable";
  at("state").dataset.phase = phase;
  say(at("phase"), `phase_${phase}`);
  at("reason").textContent = state?.reason ?? "";
  at("reason").hidden = !state?.reason;
  if (!state) return;
  const { running, waiting } = state.queue;
  at("model").textContent = state.model;
  if (running + waiting) say(at("load"), "load", state.queue);
  else hush(at("load"));
  say(at("queue"), "queue", state.queue);
  at("workers").replaceChildren(...state.workers.map(rowOf));
  at("served").replaceChildren(
    ...fact("device", [state.device, state.dtype].filter(Boolean).join(", ") || "–"),
    ...fact("revision", state.revision),
    ...fact("manifest", shortDigest(state)),
  );
}

function rowOf(worker) {
  const phase = make("td", { title: worker.reason });
  say(phase, worker.running ? "phase_busy" : `phase_${worker.phase}`);
  const memory = worker.memory_total
    ? `${Math.round(worker.memory_used / GIB)}/${Math.round(worker.memory_total / GIB)} GiB`
    : "–";
  const cells = [worker.running ? worker.forwards : "–", worker.restarts, memory];
  return make("tr", {}, make("td", { textContent: worker.index }), phase, ...cells.map((textContent) => make("td", { textContent })));
}

/** Show in a list which phases of a start are over, and which one is on. */
export function showPhases(list, state) {
  const present = START_PHASES.indexOf(state.phase);
  const items = START_PHASES.map((phase, index) => {
    const name = make("span");
    say(name, `phase_${phase}`);
    const seconds = state.phases[phase];
    const time = make("span", { textContent: seconds == null ? "" : `${seconds.toFixed(1)} s` });
    const item = make("li", { className: index < present ? "over" : index === present ? "on" : "" }, name, time);
    if (index === present) item.ariaCurrent = "step";
    return item;
  });
  list.replaceChildren(...items);
}

/** Say why the server makes nothing now: in a title and, where the phases do not tell, a reason. */
export function showReason(title, reason, state) {
  const starts = START_PHASES.includes(state?.phase);
  say(title, `phase_${starts ? "starting" : state?.phase ?? "unreachable"}`);
  reason.textContent = starts ? "" : state?.reason ?? "";
}
