// Where answers come from: the server that the page came from, or the page itself where it was exported.

import type { Answer, Catalogue, Exported, Measured, Query } from "./types";

export interface Source {
  readonly exported: Exported | null;
  catalogue(): Promise<Catalogue>;
  /** The number of a move: what a later one of this page overtakes need not be answered. */
  move(): number;
  answer(query: Query, move: number, signal: AbortSignal): Promise<Answer>;
  measured(): Promise<Measured>;
}

/** A server said 401: it wants a key, or another one. */
export class WantsKey extends Error {}

/** A later move of this page was asked before the turn of this one had come. */
export class Overtaken extends Error {}

let key = "";

/** The key to ask with from now on; it is kept nowhere else. */
export function useKey(given: string): void {
  key = given;
}

export async function ask(path: string, options: RequestInit = {}): Promise<Response> {
  const response = await fetch(path, { ...options, headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (response.status === 401) throw new WantsKey("the server wants an API key that it knows");
  return response;
}

async function asked<T>(path: string): Promise<T> {
  const response = await ask(path);
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  return (await response.json()) as T;
}

/** What a body says that is no answer: the message of an error object such as OpenAI's. */
function reason(body: unknown): string {
  const told = (body as { error?: { message?: unknown } } | null)?.error?.message;
  return typeof told === "string" ? `: ${told}` : "";
}

const KEPT = 200;

class Server implements Source {
  readonly exported = null;
  private readonly kept = new Map<string, Answer>();
  private readonly visit = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  private moves = 0;

  move(): number {
    return ++this.moves;
  }

  catalogue(): Promise<Catalogue> {
    return asked("api/catalogue");
  }

  measured(): Promise<Measured> {
    return asked("api/measured");
  }

  async answer(query: Query, move: number, signal: AbortSignal): Promise<Answer> {
    const params = new URLSearchParams();
    for (const [name, value] of Object.entries(query)) if (value !== null) params.set(name, String(value));
    const place = params.toString();
    const known = this.kept.get(place);
    if (known) return known;
    const response = await ask(`api/plan?${place}&visit=${this.visit}&move=${move}`, { signal });
    if (response.status === 204) throw new Overtaken();
    const found = (await response.json().catch(() => null)) as Answer | null;
    const answered = response.status === 200 || (response.status === 400 && typeof found?.error === "string");
    if (!found || !answered) throw new Error(`the server answered ${response.status}${reason(found)}`);
    if (this.kept.size >= KEPT) this.kept.delete(this.kept.keys().next().value as string);
    this.kept.set(place, found);
    return found;
  }
}

class Inside implements Source {
  constructor(readonly exported: Exported) {}

  catalogue(): Promise<Catalogue> {
    return Promise.resolve(this.exported.catalogue);
  }

  measured(): Promise<Measured> {
    return Promise.resolve(this.exported.measured);
  }

  move(): number {
    return 0;
  }

  answer(query: Query): Promise<Answer> {
    const key = `${query.isl}/${query.osl}/${query.tpot_s ?? ""}`;
    const found = this.exported.answers[key];
    return found ? Promise.resolve(found) : Promise.reject(new Error("this page holds no answer for these lengths"));
  }
}

export function source(): Source {
  const text = document.getElementById("answers")?.textContent ?? "null";
  const inside = JSON.parse(text) as Exported | null;
  return inside ? new Inside(inside) : new Server();
}
