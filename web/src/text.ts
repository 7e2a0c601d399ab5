// Numbers for people.

export function ms(seconds: number): string {
  if (seconds >= 1) return `${seconds.toPrecision(3)} s`;
  const value = seconds * 1e3;
  return `${value >= 100 ? value.toFixed(0) : value.toFixed(1)} ms`;
}

export function count(value: number): string {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : value < 100 ? 1 : 0 });
}

export function gib(bytes: number): string {
  return `${(bytes / 2 ** 30).toFixed(bytes < 2 ** 34 ? 2 : 1)} GiB`;
}

export function billions(parameters: number): string {
  return parameters >= 1e9 ? `${(parameters / 1e9).toFixed(1)} B` : `${(parameters / 1e6).toFixed(parameters < 1e7 ? 1 : 0)} M`;
}

export function short(name: string): string {
  return name.slice(name.lastIndexOf("/") + 1).replace(/^NVIDIA-/, "");
}

export const MODES: Record<string, string> = {
  colocated: "co-located",
  piggybacked: "chunked piggybacking",
  disaggregated: "disaggregated",
};
