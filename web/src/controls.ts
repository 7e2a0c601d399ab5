// Controls: what can be chosen, where they stand, and the address that keeps it.

import { byId, element } from "./dom";
import { billions, count, gib, ms, short } from "./text";
import type { Catalogue, Exported, Hardware, Query } from "./types";

interface Slider {
  id: keyof Query & ("gpus" | "isl" | "osl" | "ttft_s" | "tpot_s" | "budget_usd_per_hour");
  label: string;
  steps: (number | null)[];
  begin: number | null;
  told: (value: number | null) => string;
}

const doubling = (first: number, last: number): number[] => {
  const found = [];
  for (let value = first; value <= last; value *= 2) found.push(value);
  return found;
};
const number = (value: number | null): string => count(value ?? 0);
const bound = (value: number | null): string => (value === null ? "no bound" : `at most ${ms(value)}`);
const dollars = (value: number | null): string => (value === null ? "none" : `${count(value)} USD an hour`);
const TTFT_S = [0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, null];
const TPOT_S = [0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, null];
const BUDGET_USD = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, null];

function sliders(inside: Exported | null): Slider[] {
  const only = inside?.query;
  const bounds = inside ? [...inside.tpot_s.filter((t) => t !== null), null] : TPOT_S;
  const ttft_s = only ? [only.ttft_s] : TTFT_S;
  const budget = only ? [only.budget_usd_per_hour] : BUDGET_USD;
  return [
    { id: "gpus", label: "GPUs", steps: only ? [only.gpus] : doubling(1, 1024), begin: only?.gpus ?? 8, told: number },
    { id: "budget_usd_per_hour", label: "Budget", steps: budget, begin: only?.budget_usd_per_hour ?? null, told: dollars },
    { id: "isl", label: "Prompt tokens", steps: inside?.isl ?? doubling(128, 131072), begin: inside ? 2048 : 4096, told: number },
    { id: "osl", label: "Output tokens", steps: inside?.osl ?? doubling(16, 32768), begin: 512, told: number },
    { id: "ttft_s", label: "Time to first token", steps: ttft_s, begin: only ? only.ttft_s : 2, told: bound },
    { id: "tpot_s", label: "Time per output token", steps: bounds, begin: 0.02, told: bound },
  ];
}

const select = (id: string): HTMLSelectElement => byId<HTMLSelectElement>(id);

export class Controls {
  private readonly sliders: Slider[];
  /** The backend to go back to after a machine that has only one. */
  private backend = "vllm";
  private hardware: Hardware[] = [];

  constructor(private readonly inside: Exported | null) {
    this.sliders = sliders(inside);
  }

  /** Everything as the address says, or as the exported page was asked. */
  fill(catalogue: Catalogue): void {
    const models = catalogue.models.map((m): [string, string] => [m.name, `${short(m.name)} (${billions(m.parameters)})`]);
    const hardware = catalogue.hardware.map((h): [string, string] => [h.name, `${h.title} (${gib(h.memory_bytes)})`]);
    const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    const one = this.inside?.query;
    this.hardware = catalogue.hardware;
    options("model", models, one?.model ?? asked["model"] ?? "nvidia/NVIDIA-Nemotron-Nano-9B-v2");
    options("other", [["", "nothing"], ...models], this.inside ? "" : (asked["other"] ?? "Qwen/Qwen3-8B"));
    options("hardware", hardware, one?.hardware ?? asked["hardware"] ?? "h100-sxm");
    this.backend = one?.backend ?? asked["backend"] ?? this.backend;
    this.backends();
    select("hardware").addEventListener("input", () => this.backends());
    select("backend").addEventListener("input", () => (this.backend = select("backend").value));
    if (this.inside) for (const id of ["model", "other", "hardware", "backend"]) select(id).disabled = true;
    byId("sliders").replaceChildren(...this.sliders.map((slider) => sliderRow(slider, asked[slider.id])));
  }

  /** Those that are modelled on the chosen GPU. */
  private backends(): void {
    const known = this.hardware.find((h) => h.name === select("hardware").value)?.backends ?? [];
    options("backend", known.map((b): [string, string] => [b, b]), this.backend);
    select("backend").disabled = known.length < 2;
  }

  /** Where they stand. */
  query(): Query {
    const value = (slider: Slider): number | null => slider.steps[Number(byId<HTMLInputElement>(slider.id).value)] ?? null;
    const numbers = Object.fromEntries(this.sliders.map((slider) => [slider.id, value(slider)])) as Pick<Query, Slider["id"]>;
    return { model: select("model").value, hardware: select("hardware").value, backend: select("backend").value, ...numbers };
  }

  /** The model beside it; "" where there is none. */
  get other(): string {
    const chosen = select("other").value;
    return chosen === select("model").value || this.inside ? "" : chosen;
  }

  /** Keep in the address where they stand. */
  remember(): void {
    if (this.inside) return;
    const kept = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...this.query(), other: select("other").value })) {
      kept.set(name, value === null ? "" : String(value));
    }
    history.replaceState(null, "", `#${kept}`);
  }
}

function options(id: string, rows: [string, string][], chosen: string): void {
  select(id).replaceChildren(
    ...rows.map(([value, text]) => {
      const option = element("option", text, { value });
      option.selected = value === chosen;
      return option;
    }),
  );
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
