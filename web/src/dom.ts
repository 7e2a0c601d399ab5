// Elements made by hand: text goes in as text, never as HTML.

export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`#${id} is missing`);
  return found as T;
}

export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  text = "",
  attributes: Record<string, string> = {},
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function list(id: string, lines: string[]): void {
  byId(id).replaceChildren(...lines.map((line) => element("li", line)));
}

/** A figure with what it is and how sure. */
export function card(value: string, what: string, more: string): HTMLElement {
  const box = element("div", "", { class: "card" });
  box.append(element("b", value), element("span", what), element("small", more));
  return box;
}

export interface Slice {
  name: string;
  value: number;
  told: string;
  /** Drawn as what is left. */
  rest?: boolean;
}

/** A bar of named parts, with the same as a table for whoever cannot see it. */
export function bar(title: string, parts: Slice[], total: number): HTMLElement {
  const box = element("figure", "", { class: "bar" });
  box.append(element("figcaption", title));
  const strip = element("div", "", { class: "strip", role: "img", "aria-label": title });
  const legend = element("dl", "");
  parts.forEach((part, i) => {
    const share = total > 0 ? (100 * part.value) / total : 0;
    const colour = part.rest ? "rest" : `c${i % 7}`;
    const slice = element("span", "", { class: `part ${colour}`, title: `${part.name}: ${part.told}` });
    slice.style.width = `${share}%`;
    strip.append(slice);
    const name = element("dt", part.name, { class: colour });
    legend.append(name, element("dd", part.told));
  });
  box.append(strip, legend);
  return box;
}
