// The frontier: output tokens/s of a GPU against those of a user, a line for each way to deploy, and another model beside it.

import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { byId } from "./dom";
import { count, ms, MODES } from "./text";
import type { Answer, Point } from "./types";

const COLOURS: Record<string, string> = { colocated: "--blue", piggybacked: "--violet", disaggregated: "--orange" };
const HEIGHT = 340;

interface Line {
  name: string;
  colour: string;
  dash: number[] | undefined;
  star: boolean;
  points: Point[];
}

let chart: uPlot | null = null;
let shown: Line[] = [];

/** A colour of the style sheet, as it is in this scheme. */
export function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function lines(answer: Answer, other: Answer | null, names: [string, string]): Line[] {
  const made: Line[] = [];
  const add = (from: Answer, prefix: string, dash: number[] | undefined): void => {
    for (const mode of Object.keys(MODES)) {
      const points = from.frontier.filter((p) => p.mode === mode).sort((a, b) => a.user - b.user);
      const name = `${prefix}${MODES[mode]}`;
      if (points.length) made.push({ name, colour: colour(COLOURS[mode] ?? "--ink"), dash, star: false, points });
    }
  };
  add(answer, other ? `${names[0]}, ` : "", undefined);
  if (other && !other.error) add(other, `${names[1]}, `, [5, 5]);
  const b = answer.best;
  const best: Point = {
    mode: b.mode,
    user: b.tokens_per_s_per_user.value,
    gpu: b.tokens_per_s_per_gpu.value,
    low: b.tokens_per_s_per_gpu.low,
    high: b.tokens_per_s_per_gpu.high,
    ttft_s: b.ttft_s.value,
    what: "recommended",
  };
  made.push({ name: "recommended", colour: colour("--ink"), dash: undefined, star: true, points: [best] });
  return made;
}

function told(line: Line, point: Point): string {
  return (
    `${line.name}: ${count(point.user)} tokens/s a user, ${count(point.gpu)} a GPU (${count(point.low)} to ${count(point.high)}), ` +
    `TTFT ${ms(point.ttft_s)}; ${point.what}`
  );
}

function star(u: uPlot, seriesIdx: number): null {
  const line = shown[seriesIdx - 1];
  const point = line?.points[0];
  if (!line || !point) return null;
  const x = u.valToPos(point.user, "x", true);
  const y = u.valToPos(point.gpu, "y", true);
  const size = 9 * devicePixelRatio;
  u.ctx.fillStyle = line.colour;
  u.ctx.beginPath();
  for (let i = 0; i < 10; i++) {
    const radius = i % 2 ? size * 0.45 : size;
    const angle = (Math.PI * i) / 5 - Math.PI / 2;
    u.ctx.lineTo(x + radius * Math.cos(angle), y + radius * Math.sin(angle));
  }
  u.ctx.fill();
  return null;
}

function options(width: number): uPlot.Options {
  const axis = { stroke: colour("--ink"), grid: { stroke: colour("--grid"), width: 1 }, font: "12px system-ui" };
  return {
    width,
    height: HEIGHT,
    mode: 2,
    legend: { show: true, live: false },
    cursor: { drag: { x: false, y: false }, points: { show: false } },
    scales: {
      x: { time: false, auto: false, range: () => span((p) => p.user) },
      y: { auto: false, range: () => span((p) => p.high) },
    },
    axes: [
      { ...axis, label: "tokens/s a user (1 / TPOT)", labelSize: 22 },
      { ...axis, label: "output tokens/s a GPU", size: 64, labelSize: 22 },
    ],
    series: [
      {},
      ...shown.map((line) => ({
        label: line.name,
        stroke: line.colour,
        width: 2,
        facets: [
          { scale: "x", auto: true },
          { scale: "y", auto: true },
        ],
        ...(line.dash ? { dash: line.dash } : {}),
        paths: line.star ? star : drawn,
      })),
    ],
    hooks: { setCursor: [read] },
  } as unknown as uPlot.Options;
}

function span(of: (p: Point) => number): [number, number] {
  return [0, 1.05 * Math.max(1e-9, ...shown.flatMap((line) => line.points.map(of)))];
}

/** A line through the points of a series, with a dot at each. */
function drawn(u: uPlot, seriesIdx: number): null {
  const line = shown[seriesIdx - 1];
  if (!line) return null;
  const { ctx } = u;
  const at = line.points.map((p) => [u.valToPos(p.user, "x", true), u.valToPos(p.gpu, "y", true)] as const);
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = line.colour;
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.setLineDash((line.dash ?? []).map((d) => d * devicePixelRatio));
  ctx.beginPath();
  at.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.stroke();
  for (const [x, y] of at) {
    ctx.beginPath();
    ctx.arc(x, y, 2.5 * devicePixelRatio, 0, 2 * Math.PI);
    ctx.fill();
  }
  ctx.restore();
  return null;
}

/** The point nearest to where the pointer is, in words under the chart. */
function read(u: uPlot): void {
  const { left, top } = u.cursor;
  if (left === undefined || top === undefined || left < 0) return;
  let nearest = "";
  let least = Infinity;
  for (const line of shown) {
    for (const point of line.points) {
      const away = Math.hypot(u.valToPos(point.user, "x") - left, u.valToPos(point.gpu, "y") - top);
      if (away < least) [least, nearest] = [away, told(line, point)];
    }
  }
  byId("point").textContent = least < 40 ? nearest : "";
}

export function drawFrontier(answer: Answer, other: Answer | null, names: [string, string]): void {
  const box = byId("frontier");
  shown = lines(answer, other, names);
  const data = [null, ...shown.map((l) => [l.points.map((p) => p.user), l.points.map((p) => p.gpu)])];
  chart?.destroy();
  chart = new uPlot(options(box.clientWidth), data as unknown as uPlot.AlignedData, box);
  byId("point").textContent = "";
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", shown.map((l) => `${l.name}, ${l.points.length} points`).join("; "));
}

/** No answer, no chart. */
export function clearFrontier(): void {
  chart?.destroy();
  chart = null;
  shown = [];
  for (const name of ["role", "aria-label"]) byId("frontier").removeAttribute(name);
  byId("point").textContent = "";
}

export function resizeFrontier(): void {
  chart?.setSize({ width: byId("frontier").clientWidth, height: HEIGHT });
}
