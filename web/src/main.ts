// What is asked where the controls stand, and what is drawn of the answer.

import "./style.css";
import { Controls } from "./controls";
import { bar, byId, card, list, type Slice } from "./dom";
import { clearFrontier, drawFrontier, resizeFrontier } from "./frontier";
import { watch } from "./live";
import { drawMeasured } from "./measured";
import { Overtaken, source, useKey, WantsKey } from "./source";
import { count, gib, MODES, ms, short } from "./text";
import type { Answer, Catalogue, Measured } from "./types";

const MEMORY: Record<string, string> = {
  weight_bytes: "weights",
  kv_bytes: "keys and values",
  state_bytes: "recurrent state",
  workspace_bytes: "workspace",
};

const from = source();
const inside = from.exported;
const controls = new Controls(inside);

let asking = new AbortController();
/** Seconds that a model's last whole answer took: a slow one gets a rough one first, so that sliders are followed. */
const took = new Map<string, number>();
const SLOW_S = 0.08;
const REST_MS = 150;

async function ask(): Promise<void> {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const asked = controls.query();
  const { other } = controls;
  controls.remember();
  const move = from.move();
  const once = async (rough: boolean): Promise<void> => {
    const began = performance.now();
    const one = (model: string): Promise<Answer> => from.answer({ ...asked, model, ...(rough ? { rough } : {}) }, move, signal);
    const both = [one(asked.model), other ? one(other).catch(() => null) : null] as const;
    const answer = await both[0];
    const beside = await both[1];
    if (signal.aborted) return;
    show(answer, beside, other);
    if (answer.error) return;
    if (!rough) took.set(asked.model, answer.seconds);
    if (!rough && beside && !beside.error) took.set(other, beside.seconds);
    const more = rough ? " A first look, at every fourth batch size: the whole answer follows." : "";
    const waited = ms((performance.now() - began) / 1e3);
    byId("took").textContent = `${count(answer.points)} design points, priced in ${ms(answer.seconds)}; this page waited ${waited}.${more}`;
  };
  try {
    if (!inside && Math.max(took.get(asked.model) ?? 0, took.get(other) ?? 0) > SLOW_S) {
      await once(true);
      await new Promise((resolve) => setTimeout(resolve, REST_MS));
      if (signal.aborted) return;
    }
    await once(false);
  } catch (wrong) {
    if (!signal.aborted && !(wrong instanceof Overtaken)) refuse(wrong instanceof Error ? wrong.message : String(wrong));
  }
}

/** One line, and nothing that an earlier answer has left. */
function refuse(why: string): void {
  byId("headline").textContent = why;
  byId("headline").classList.add("refused");
  for (const id of ["cards", "why", "changes", "memory", "time", "took"]) byId(id).replaceChildren();
  clearFrontier();
}

function show(answer: Answer, other: Answer | null, otherName: string): void {
  if (answer.error) return refuse(answer.error);
  byId("headline").classList.remove("refused");
  const b = answer.best;
  const [first = "", ...rest] = answer.why;
  const price = answer.price_per_hour_usd;
  if (other?.error) rest.push(`beside it, ${short(otherName)}: ${other.error}`);
  byId("headline").textContent = `${short(answer.model)} on ${b.gpus} x ${answer.hardware}: ${first}`;
  const beside = other && !other.error ? other.best : null;
  const cards: [string, string, string][] = [
    [ms(b.ttft_s.value), "to the first token", interval(b.ttft_s, ms)],
    [ms(b.tpot_s.value), "per output token", interval(b.tpot_s, ms)],
    [count(b.tokens_per_s_per_gpu.value), "tokens/s a GPU", interval(b.tokens_per_s_per_gpu, count)],
    [count(b.tokens_per_s), "tokens/s in all", price === null ? "of no known price" : `${count(price)} USD an hour`],
  ];
  if (beside) {
    const ratio = b.tokens_per_s / b.gpus / (beside.tokens_per_s / beside.gpus);
    cards.push([`${ratio.toFixed(2)}x`, `the throughput of ${short(otherName)}`, MODES[beside.mode] ?? beside.mode]);
  }
  byId("cards").replaceChildren(...cards.map(([value, what, more]) => card(value, what, more)));
  list("why", rest);
  list("changes", answer.changes.length ? answer.changes : ["Nothing that was tried: other bounds and budgets recommend the same."]);
  drawFrontier(answer, other, [short(answer.model), short(otherName)]);
  byId("memory").replaceChildren(...Object.entries(b.memory).map(([pool, bytes]) => memoryBar(pool, bytes, answer.usable_bytes)));
  byId("time").replaceChildren(...Object.entries(b.time_by_class).map(([pool, classes]) => timeBar(pool, classes)));
}

function interval(e: { low: number; high: number }, form: (value: number) => string): string {
  return `${form(e.low)} to ${form(e.high)}`;
}

function memoryBar(pool: string, bytes: Record<string, number>, usable: number): HTMLElement {
  const parts: Slice[] = Object.entries(MEMORY)
    .filter(([name]) => (bytes[name] ?? 0) > 0)
    .map(([name, text]) => ({ name: text, value: bytes[name] ?? 0, told: gib(bytes[name] ?? 0) }));
  const held = parts.reduce((sum, part) => sum + part.value, 0);
  const free = Math.max(0, usable - held);
  parts.push({ name: "free", value: free, told: gib(free), rest: true });
  return bar(`${pool}: ${gib(held)} of ${gib(usable)}`, parts, usable);
}

function timeBar(pool: string, classes: Record<string, Record<string, number>>): HTMLElement {
  const parts: Slice[] = Object.entries(classes)
    .map(([name, time]) => ({ name: name.replaceAll("_", " "), value: time["seconds"] ?? 0, told: ms(time["seconds"] ?? 0) }))
    .filter((part) => part.value > 0)
    .sort((a, c) => c.value - a.value);
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  return bar(`${pool}: ${ms(total)}`, parts, total);
}

/** The catalogue, once the server lets us in. */
async function enter(): Promise<{ catalogue: Catalogue; locked: boolean }> {
  for (let locked = false; ; locked = true) {
    try {
      return { catalogue: await from.catalogue(), locked };
    } catch (wrong) {
      if (!(wrong instanceof WantsKey)) throw wrong;
      byId("headline").textContent = locked ? "That key is not known here." : "";
      await keyGiven();
    }
  }
}

function keyGiven(): Promise<void> {
  const form = byId<HTMLFormElement>("keys");
  form.hidden = false;
  byId("key").focus();
  return new Promise((resolve) => {
    const take = (event: Event): void => {
      event.preventDefault();
      useKey(byId<HTMLInputElement>("key").value.trim());
      form.hidden = true;
      resolve();
    };
    form.addEventListener("submit", take, { once: true });
  });
}

/** Measured rows are asked for when somebody wants to see them: pricing them takes seconds. */
function measuredRows(): void {
  let found: Measured | null = null;
  const draw = async (): Promise<void> => {
    if (!byId<HTMLDetailsElement>("measured").open) return;
    byId("nearness-told").textContent = found ? "" : "Pricing what was measured ...";
    try {
      found ??= await from.measured();
      drawMeasured(found);
    } catch (wrong) {
      byId("nearness-told").textContent = wrong instanceof Error ? wrong.message : String(wrong);
    }
  };
  byId("measured").addEventListener("toggle", () => void draw());
  byId("metric").addEventListener("change", () => void draw());
  addEventListener("resize", () => void draw());
  void draw(); // a browser may bring the page back with it open
}

async function begin(): Promise<void> {
  byId("mode").textContent = inside
    ? "Exported: answers were computed beforehand for the lengths and bounds that the sliders stop at."
    : "Every answer is the planner's own, computed as you move.";
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  try {
    const { catalogue, locked } = await enter();
    controls.fill(catalogue);
    if (catalogue.live) watch(catalogue.live, locked);
  } catch (wrong) {
    return refuse(`The catalogue cannot be read: ${wrong instanceof Error ? wrong.message : String(wrong)}`);
  }
  let frame = 0;
  byId("controls").addEventListener("input", () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => void ask());
  });
  addEventListener("resize", resizeFrontier);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => void ask());
  measuredRows();
  await ask();
}

void begin();
