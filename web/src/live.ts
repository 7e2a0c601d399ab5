// The workers of the server that this page came from: asked every second while the page is looked at.

import { byId, card, element, list } from "./dom";
import { ask, WantsKey } from "./source";
import { count, ms } from "./text";
import type { Pools, Worker } from "./types";

const EVERY_MS = 1000;
const MODE: Record<Pools["mode"], string> = {
  off: "Nobody scales these workers; start the server with --scale for that.",
  running: "The controller scales these workers.",
  paused: "The controller is paused: workers stay as they are.",
  "dry-run": "The controller only says what it would change.",
};

let asks = 0;

function state(worker: Worker): string {
  if (!worker.up) return "starting";
  return worker.draining ? "draining" : "up";
}

function row(worker: Worker): HTMLElement {
  const line = element("tr");
  const numbers = [
    `${count(worker.running)} of ${count(worker.max_batch)}`,
    count(worker.waiting),
    count(worker.queued_tokens),
    count(worker.free_tokens),
  ];
  const cells = [worker.role, state(worker), ...(worker.up ? numbers : numbers.map(() => "-"))];
  line.append(element("th", worker.id, { scope: "row" }), ...cells.map((text) => element("td", text)));
  return line;
}

function show(pools: Pools): void {
  const { recent } = pools;
  byId("live-state").textContent = pools.changing ? `${MODE[pools.mode]} A change is under way.` : MODE[pools.mode];
  const time = (name: string, found: { p50: number; p90: number } | null): HTMLElement =>
    card(found ? ms(found.p50) : "-", name, found ? `9 of 10 within ${ms(found.p90)}` : "no request has ended");
  byId("recent").replaceChildren(
    time("to the first token", recent.ttft_s),
    time("per output token", recent.tpot_s),
    card(count(recent.tokens_per_s), "output tokens/s", `${count(recent.requests)} requests ended in ${count(recent.window_s)} s`),
  );
  byId("workers").replaceChildren(...pools.workers.map(row));
  const last = pools.decisions.length - 1;
  const told = pools.decisions.filter((d, i) => i === last || d.steps.length).reverse().map((d) => {
    const steps = d.steps.length ? `; ${d.steps.join(", ")}` : "";
    return `${count(Math.max(0, Math.round(pools.at_s - d.at_s)))} s ago: ${d.reason}${steps}`;
  });
  byId("decided").hidden = pools.mode === "off";
  list("decisions", told.length || pools.mode === "off" ? told : ["Nothing yet."]);
  const pause = byId<HTMLButtonElement>("pause");
  pause.hidden = pools.mode !== "running" && pools.mode !== "paused";
  pause.textContent = pools.mode === "paused" ? "Let the controller go on" : "Pause the controller";
  pause.dataset["path"] = pools.mode === "paused" ? "resume" : "pause";
}

async function look(path: string): Promise<void> {
  const mine = ++asks;
  try {
    const response = await ask(path);
    const found = (await response.json()) as Pools;
    if (mine === asks) show(found);
  } catch (wrong) {
    const why = wrong instanceof WantsKey ? wrong.message : "it cannot be reached";
    byId("live-state").textContent = `This server does not answer: ${why}. What stands here is what it said last.`;
  }
}

async function change(path: string): Promise<void> {
  const told = byId("pause-why");
  told.textContent = "";
  try {
    const response = await ask(`${path}/${byId("pause").dataset["path"]}`, { method: "POST" });
    if (!response.ok) told.textContent = `Not changed: the server answered ${response.status}.`;
  } catch (wrong) {
    told.textContent = `Not changed: ${wrong instanceof Error ? wrong.message : String(wrong)}.`;
  }
  await look(path);
}

/** Begin to watch the workers that `path` tells of. */
export function watch(path: string, locked: boolean): void {
  byId("live").hidden = false;
  byId("pause").addEventListener("click", () => void change(path));
  if (!locked) {
    byId<HTMLButtonElement>("pause").disabled = true;
    byId("pause-why").textContent = "The switch is for servers with --api-keys: here whoever reached the page could turn it.";
  }
  setInterval(() => {
    if (!document.hidden) void look(path);
  }, EVERY_MS);
  void look(path);
}
