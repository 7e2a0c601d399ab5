// Where answers come from: the server that the page came from, or the page itself where it was exported.

import type { Answer, Catalogue, Exported, Query } from "./types";

export interface Source {
  readonly exported: Exported | null;
  catalogue(): Promise<Catalogue>;
  answer(query: Query, signal: AbortSignal): Promise<Answer>;
}

const KEPT = 200;

class Server implements Source {
  readonly exported = null;
  private readonly kept = new Map<string, Answer>();

  async catalogue(): Promise<Catalogue> {
    const answer = await fetch("api/catalogue");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    return (await answer.json()) as Catalogue;
  }

  async answer(query: Query, signal: AbortSignal): Promise<Answer> {
    const asked = new URLSearchParams();
    for (const [name, value] of Object.entries(query)) if (value !== null) asked.set(name, String(value));
    const key = asked.toString();
    const known = this.kept.get(key);
    if (known) return known;
    const response = await fetch(`api/plan?${key}`, { signal });
    const found = (await response.json()) as Answer;
    if (!response.ok && !found.error) throw new Error(`the server answered ${response.status}`);
    if (this.kept.size >= KEPT) this.kept.delete(this.kept.keys().next().value as string);
    this.kept.set(key, found);
    return found;
  }
}

class Inside implements Source {
  constructor(readonly exported: Exported) {}

  catalogue(): Promise<Catalogue> {
    return Promise.resolve(this.exported.catalogue);
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
