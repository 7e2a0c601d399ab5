// Controls, and what is drawn of the answer to where they stand.

import "./style.css";
import { bar, byId, card, element, list, type Slice } from "./dom";
import { drawFrontier, resizeFrontier } from "./frontier";
import { watch } from "./live";
import { drawMeasured } from "./measured";
import { source, useKey, WantsKey } from "./source";
import { billions, count, gib, MODES, ms, short } from "./text";
import type { Answer, Catalogue, Measured, Query } from "./types";

const MEMORY: Record<string, string> = {
  weight_bytes: "weights",
  kv_bytes: "keys and values",
  state_bytes: "recurrent state",
  workspace_bytes: "workspace",
};

interface Slider {
  id: keyof Query & ("gpus" | "isl" | "osl" | "ttft_s" | "tpot_s");
  label: string;
  steps: (number | null)[];
  begin: number | null;
  told: (value: number | null) => string;
}

const from = source();
const doubling = (first: number, last: number): number[] => {
  const found = [];
  for (let value = first; value <= last; value *= 2) found.push(value);
  return found;
};
const bound = (value: number | null): string => (value === null ? "no bound" : `at most ${ms(value)}`);
const inside = from.exported;
const SLIDERS: Slider[] = [
  { id: "gpus", label: "GPUs", steps: inside ? [inside.query.gpus] : doubling(1, 1024), begin: inside?.query.gpus ?? 8, told: (v) => count(v ?? 0) },
  { id: "isl", label: "Prompt tokens", steps: inside?.isl ?? doubling(128, 131072), begin: inside ? 2048 : 4096, told: (v) => count(v ?? 0) },
  { id: "osl", label: "Output tokens", steps: inside?.osl ?? doubling(16, 32768), begin: 512, told: (v) => count(v ?? 0) },
  {
    id: "ttft_s",
    label: "Time to first token",
    steps: inside ? [inside.query.ttft_s] : [0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, null],
    begin: inside ? inside.query.ttft_s : 2,
    told: bound,
  },
  {
    id: "tpot_s",
    label: "Time per output token",
    steps: inside ? [...inside.tpot_s.filter((t) => t !== null), null] : [0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, null],
    begin: 0.02,
    told: bound,
  },
];

let asking = new AbortController();
/** Seconds that a model's last whole answer took: a slow one gets a rough one first, so that sliders are followed. */
const took = new Map<string, number>();
const SLOW_S = 0.08;
const REST_MS = 150;

function select(id: string): HTMLSelectElement {
  return byId<HTMLSelectElement>(id);
}

function fill(id: string, rows: [string, string][], chosen: string): void {
  select(id).replaceChildren(
    ...rows.map(([value, text]) => {
      const option = element("option", text, { value });
      option.selected = value === chosen;
      return option;
    }),
  );
}

function controls(catalogue: Catalogue): void {
  const models = catalogue.models.map((m): [string, string] => [m.name, `${short(m.name)} (${billions(m.parameters)})`]);
  const hardware = catalogue.hardware.map((h): [string, string] => [h.name, `${h.title} (${gib(h.memory_bytes)})`]);
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const one = inside?.query;
  fill("model", models, one?.model ?? asked["model"] ?? "nvidia/NVIDIA-Nemotron-Nano-9B-v2");
  fill("other", [["", "nothing"], ...models], inside ? "" : (asked["other"] ?? "Qwen/Qwen3-8B"));
  fill("hardware", hardware, one?.hardware ?? asked["hardware"] ?? "h100-sxm");
  fill("backend", catalogue.backends.map((b): [string, string] => [b, b]), one?.backend ?? asked["backend"] ?? "vllm");
  if (inside) for (const id of ["model", "other", "hardware", "backend"]) select(id).disabled = true;
  byId("sliders").replaceChildren(...SLIDERS.map((slider) => sliderRow(slider, asked[slider.id])));
}

function sliderRow(slider: Slider, asked: string | undefined): HTMLElement {
  const wanted = asked === undefined ? slider.begin : asked === "" ? null : Number(asked);
  const at = Math.max(0, slider.steps.indexOf(slider.steps.includes(wanted) ? wanted : slider.begin));
  const label = element("label", `${slider.label} `);
  const output = element("output", slider.told(slider.steps[at] ?? null), { id: `${slider.id}-told` });
  const input = element("input", "", { type: "range", id: slider.id, min: "0", max: String(slider.steps.length - 1), step: "1" });
  input.value = String(at);
  input.disabled = slider.steps.length < 2;
  const tell = (): void => {
    const told = slider.told(slider.steps[Number(input.value)] ?? null);
    output.textContent = told;
    input.setAttribute("aria-valuetext", told);
  };
  tell();
  input.addEventListener("input", tell);
  label.append(output, input);
  return label;
}

function query(): Query {
  const value = (slider: Slider): number | null => slider.steps[Number(byId<HTMLInputElement>(slider.id).value)] ?? null;
  const numbers = Object.fromEntries(SLIDERS.map((slider) => [slider.id, value(slider)])) as Pick<Query, Slider["id"]>;
  const texts = { model: select("model").value, hardware: select("hardware").value, backend: select("backend").value };
  return { ...texts, ...numbers };
}

function remember(asked: Query): void {
  if (inside) return;
  const kept = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...asked, other: select("other").value })) kept.set(name, value === null ? "" : String(value));
  history.replaceState(null, "", `#${kept}`);
}

async function ask(): Promise<void> {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  const asked = query();
  const other = select("other").value;
  remember(asked);
  const once = async (rough: boolean): Promise<void> => {
    const began = performance.now();
    const how = rough ? { rough } : {};
    const beside = other && other !== asked.model && !inside ? from.answer({ ...asked, ...how, model: other }, signal) : null;
    const answer = await from.answer({ ...asked, ...how }, signal);
    const second = beside ? await beside.catch(() => null) : null;
    if (signal.aborted) return;
    show(answer, second, asked, other);
    if (!answer.error && !rough) took.set(asked.model, answer.seconds);
    const more = rough ? " A first look, at every fourth batch size: the whole answer follows." : "";
    byId("took").textContent = answer.error
      ? ""
      : `${count(answer.points)} design points, priced in ${ms(answer.seconds)}; this page waited ${ms((performance.now() - began) / 1e3)}.${more}`;
  };
  try {
    if ((took.get(asked.model) ?? 0) > SLOW_S && !inside) {
      await once(true);
      await new Promise((resolve) => setTimeout(resolve, REST_MS));
      if (signal.aborted) return;
    }
    await once(false);
  } catch (wrong) {
    if (!signal.aborted) refuse(wrong instanceof Error ? wrong.message : String(wrong));
  }
}

function refuse(why: string): void {
  byId("headline").textContent = why;
  byId("headline").classList.add("refused");
  for (const id of ["cards", "why", "changes", "memory", "time"]) byId(id).replaceChildren();
}

function show(answer: Answer, other: Answer | null, asked: Query, otherName: string): void {
  if (answer.error) return refuse(answer.error);
  byId("headline").classList.remove("refused");
  const b = answer.best;
  const [first = "", ...rest] = answer.why;
  byId("headline").textContent = `${short(asked.model)} on ${b.gpus} x ${asked.hardware}: ${first}`;
  const beside = other && !other.error ? other.best : null;
  const cards: [string, string, string][] = [
    [ms(b.ttft_s.value), "to the first token", interval(b.ttft_s, ms)],
    [ms(b.tpot_s.value), "per output token", interval(b.tpot_s, ms)],
    [count(b.tokens_per_s_per_gpu.value), "tokens/s a GPU", interval(b.tokens_per_s_per_gpu, count)],
    [count(b.tokens_per_s), "tokens/s in all", `${count(answer.price_per_hour_usd)} USD an hour`],
  ];
  if (beside) {
    const ratio = b.tokens_per_s / b.gpus / (beside.tokens_per_s / beside.gpus);
    cards.push([`${ratio.toFixed(2)}x`, `the throughput of ${short(otherName)}`, MODES[beside.mode] ?? beside.mode]);
  }
  byId("cards").replaceChildren(...cards.map(([value, what, more]) => card(value, what, more)));
  list("why", rest);
  list("changes", answer.changes.length ? answer.changes : ["Nothing that was tried: other bounds and budgets recommend the same."]);
  drawFrontier(answer, other, [short(asked.model), short(otherName)]);
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
    controls(catalogue);
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
