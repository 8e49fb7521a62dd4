// Helpers for elements and numbers. Text is set as text, and never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

export const at = (id) => document.getElementById(id);

export function table(heads, rows) {
  const cell = (tag, value, number) =>
    el(tag, tag === "th" ? { scope: "col", class: number ? "number" : null } : { class: number ? "number" : null }, value);
  return el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map(([text, number]) => cell("th", text, number)))),
    el("tbody", {}, ...rows.map((row) =>
      el("tr", {}, ...row.map((value, index) => cell("td", value, heads[index][1]))))));
}

export const count = (number) => Math.round(number).toLocaleString("en");

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return `${unit === 0 || number >= 100 ? number.toFixed(0) : number.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 0) return `-${duration(-seconds)}`;
  if (seconds === 0) return "0 s";
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  for (const [limit, unit, by] of [[120, "s", 1], [7200, "min", 60], [172800, "h", 3600]]) {
    if (seconds < limit) return `${(seconds / by).toFixed(by === 1 && seconds < 10 ? 1 : 0)} ${unit}`;
  }
  return `${(seconds / 86400).toFixed(1)} d`;
}

export const ratio = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
