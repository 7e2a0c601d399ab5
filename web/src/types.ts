// What tandem/explore/answers.py sends.

export interface Estimate {
  value: number;
  low: number;
  high: number;
  evidence: string;
}

export interface Point {
  mode: string;
  user: number;
  gpu: number;
  low: number;
  high: number;
  ttft_s: number;
  what: string;
}

export interface Best {
  mode: string;
  gpus: number;
  ttft_s: Estimate;
  tpot_s: Estimate;
  tokens_per_s_per_gpu: Estimate;
  tokens_per_s_per_user: Estimate;
  tokens_per_s: number;
  memory: Record<string, Record<string, number>>;
  time_by_class: Record<string, Record<string, Record<string, number>>>;
}

export interface Answer {
  error?: string;
  model: string;
  hardware: string;
  /** GPUs that it was planned within: those asked, or fewer where the budget pays for fewer. */
  gpus: number;
  paid_gpus: number | null;
  rough: boolean;
  recommended: Record<string, unknown>;
  gain: number | null;
  best: Best;
  usable_bytes: number;
  price_per_hour_usd: number | null;
  frontier: Point[];
  why: string[];
  changes: string[];
  points: number;
  seconds: number;
}

export interface Model {
  name: string;
  parameters: number;
  family: string;
  max_context: number;
}

export interface Hardware {
  name: string;
  title: string;
  memory_bytes: number;
  price_per_hour_usd: number | null;
  backends: string[];
}

export interface Catalogue {
  models: Model[];
  hardware: Hardware[];
  /** Where a server tells of its workers, seen from this page. */
  live?: string | null;
}

export interface Worker {
  id: string;
  role: string;
  up: boolean;
  draining: boolean;
  running: number;
  waiting: number;
  queued_tokens: number;
  context_tokens: number;
  free_tokens: number;
  max_batch: number;
}

export interface Pools {
  mode: "off" | "running" | "paused" | "dry-run";
  changing: boolean;
  at_s: number;
  workers: Worker[];
  decisions: { at_s: number; targets: Record<string, number>; reason: string; steps: string[] }[];
  recent: {
    window_s: number;
    requests: number;
    tokens_per_s: number;
    ttft_s: { p50: number; p90: number } | null;
    tpot_s: { p50: number; p90: number } | null;
  };
}

export interface Measured {
  error?: string;
  source: string;
  rows: { metric: string; group: string; what: string; measured: number; predicted: number }[];
}

export interface Query {
  model: string;
  hardware: string;
  gpus: number;
  isl: number;
  osl: number;
  ttft_s: number | null;
  tpot_s: number | null;
  budget_usd_per_hour: number | null;
  backend: string;
  rough?: boolean;
}

export interface Exported {
  query: Query;
  isl: number[];
  osl: number[];
  tpot_s: (number | null)[];
  catalogue: Catalogue;
  answers: Record<string, Answer>;
  measured: Measured;
}
