// Predictions beside measurements: a point for each measured deployment, on logarithmic axes.

import uPlot from "uplot";
import { byId } from "./dom";
import { colour } from "./frontier";
import { ms } from "./text";
import type { Measured } from "./types";

const HEIGHT = 340;
type Row = Measured["rows"][number];
let chart: uPlot | null = null;
let groups: [string, Row[]][] = [];

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? (sorted[middle] ?? NaN) : ((sorted[middle - 1] ?? NaN) + (sorted[middle] ?? NaN)) / 2;
}

function dots(u: uPlot, seriesIdx: number): null {
  const rows = groups[seriesIdx - 1]?.[1] ?? [];
  u.ctx.fillStyle = colour(`--c${(seriesIdx - 1) % 7}`);
  for (const row of rows) {
    u.ctx.beginPath();
    u.ctx.arc(u.valToPos(row.measured, "x", true), u.valToPos(row.predicted, "y", true), 2.5 * devicePixelRatio, 0, 2 * Math.PI);
    u.ctx.fill();
  }
  return null;
}

function diagonal(u: uPlot): void {
  const { min = 0, max = 0 } = u.scales["x"] ?? {};
  u.ctx.save();
  u.ctx.strokeStyle = colour("--ink");
  u.ctx.beginPath();
  u.ctx.moveTo(u.valToPos(min, "x", true), u.valToPos(min, "y", true));
  u.ctx.lineTo(u.valToPos(max, "x", true), u.valToPos(max, "y", true));
  u.ctx.stroke();
  u.ctx.restore();
}

function read(u: uPlot): void {
  const { left, top } = u.cursor;
  if (left === undefined || top === undefined || left < 0) return;
  let least = 40;
  for (const [name, rows] of groups) {
    for (const row of rows) {
      const away = Math.hypot(u.valToPos(row.measured, "x") - left, u.valToPos(row.predicted, "y") - top);
      if (away >= least) continue;
      least = away;
      byId("nearness-told").textContent = `${name}, ${row.what}: measured ${ms(row.measured)}, predicted ${ms(row.predicted)}`;
    }
  }
}

export function drawMeasured(found: Measured): void {
  const box = byId("nearness");
  chart?.destroy();
  chart = null;
  if (found.error !== undefined || !found.rows.length) {
    byId("nearness-told").textContent = found.error ?? "Nothing was measured.";
    return;
  }
  const metric = byId<HTMLSelectElement>("metric").value;
  const rows = found.rows.filter((row) => row.metric === metric);
  const names = [...new Set(rows.map((row) => row.group))];
  groups = names.map((name) => [name, rows.filter((row) => row.group === name)]);
  const values = rows.flatMap((row) => [row.measured, row.predicted]);
  const range = (): [number, number] => [Math.min(...values) / 1.3, Math.max(...values) * 1.3];
  const axis = { stroke: colour("--ink"), grid: { stroke: colour("--grid"), width: 1 }, font: "12px system-ui" };
  const round = (tick: number): boolean => [1, 2, 5].includes(Number((tick / 10 ** Math.floor(Math.log10(tick) + 1e-9)).toFixed(3)));
  const told = (_: uPlot, ticks: number[]): string[] => ticks.map((tick) => (round(tick) ? ms(tick) : ""));
  const facets = [{ scale: "x", auto: true }, { scale: "y", auto: true }];
  const options = {
    width: box.clientWidth,
    height: HEIGHT,
    mode: 2,
    legend: { show: true, live: false },
    cursor: { drag: { x: false, y: false }, points: { show: false } },
    scales: { x: { time: false, distr: 3, auto: false, range }, y: { distr: 3, auto: false, range } },
    axes: [{ ...axis, label: "measured", labelSize: 22, values: told }, { ...axis, label: "predicted", size: 64, labelSize: 22, values: told }],
    series: [{}, ...groups.map(([name], i) => ({ label: name, stroke: colour(`--c${i % 7}`), facets, paths: dots }))],
    hooks: { setCursor: [read], drawAxes: [diagonal] },
  } as unknown as uPlot.Options;
  const data = [null, ...groups.map(([, of]) => [of.map((r) => r.measured), of.map((r) => r.predicted)])];
  chart = new uPlot(options, data as unknown as uPlot.AlignedData, box);
  const errors = groups.map(([name, of]) => {
    const away = median(of.map((r) => Math.abs(r.predicted / r.measured - 1)));
    return `${name}: ${of.length} points, median error ${(100 * away).toFixed(0)} %`;
  });
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", errors.join("; "));
  byId("nearness-told").textContent = `${errors.join("; ")}. ${found.source}.`;
}
