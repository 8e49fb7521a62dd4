// The list of entries, and one entry, whose content is shown as text whatever it is.

import { askJson } from "./api.js";
import { at, bytes, count, duration, el, table } from "./dom.js";
import { askToPurge } from "./purge.js";
import { textOf } from "./answer_text.js";

const PAGE = 50;
const HEADS = [["Key"], ["Frequency", true], ["Tiers"], ["Size", true], ["Age", true], ["Expires in", true], ["Labels"]];
let query = {};

function queryOf(form) {
  const { by, text, tier } = form.elements;
  const params = { limit: PAGE };
  const value = text.value.trim();
  if (value && by.value === "prefix") params.prefix = value;
  else if (value) params.label = `${by.value}:${value}`;
  if (tier.value) params.tier = tier.value;
  return params;
}

function row(entry) {
  const key = el("button", { class: "link key", type: "button", title: entry.key, onclick: () => show(entry.key) },
    entry.key.length > 16 ? `${entry.key.slice(0, 16)}…` : entry.key);
  return [key, count(entry.frequency), entry.tiers.join(", "), bytes(entry.bytes), duration(entry.age_s),
    duration(entry.ttl_s), el("span", { class: "labels" }, entry.labels.join(", "))];
}

async function page(after) {
  const problem = at("entries-problem");
  problem.textContent = "";
  try {
    const params = new URLSearchParams(after ? { ...query, after } : query);
    const found = await askJson(`entries?${params}`);
    const drawn = table(HEADS, found.entries.map(row));
    const old = after ? at("entries").querySelector("tbody") : null;
    if (old) old.append(...drawn.querySelectorAll("tbody tr"));
    else at("entries").replaceChildren(found.entries.length || found.after ? drawn : el("p", { class: "quiet" }, "No entry matches."));
    const more = at("more");
    more.hidden = !found.after;
    more.onclick = () => page(found.after);
  } catch (failed) {
    problem.textContent = failed.message;
  }
}

export async function search() {
  query = queryOf(at("search"));
  await page("");
}

// Browsers take seconds to lay out a megabyte.
const MAX_CHARACTERS = 100_000;

const cut = (text) =>
  (text.length > MAX_CHARACTERS ? `${text.slice(0, MAX_CHARACTERS)}\n… and ${count(text.length - MAX_CHARACTERS)} more characters` : text);

function readable(content) {
  let text = content;
  try { text = JSON.stringify(JSON.parse(content), null, 2); } catch { /* An event stream. */ }
  return cut(text);
}

async function show(key) {
  const shown = at("entry");
  try {
    const entry = await askJson(`entries/${encodeURIComponent(key)}`);
    const close = () => { shown.replaceChildren(); };
    const text = textOf(entry.content);
    shown.replaceChildren(
      el("h3", {}, "Entry ", el("span", { class: "key" }, entry.key)),
      el("p", {}, `${entry.state}, stored ${new Date(entry.stored_at * 1000).toLocaleString()}, generated in ${duration(entry.took_s)}, `,
        `in ${entry.tiers.join(" and ") || "no tier that lists its entries"}. Labels: ${entry.labels.join(", ") || "none"}.`),
      ...(text ? [el("p", { class: "text", role: "region", tabindex: "0", "aria-label": "The answer's text" }, cut(text))] : []),
      el("pre", { class: "content", tabindex: "0", "aria-label": "The entry's content" }, readable(entry.content)),
      el("div", { class: "row" },
        el("button", { class: "danger", type: "button", onclick: async () => { if (await askToPurge("key", entry.key)) close(); } }, "Purge this entry…"),
        el("button", { class: "plain", type: "button", onclick: close }, "Close")));
    shown.focus();
  } catch (failed) {
    at("entries-problem").textContent = failed.message;
  }
}

export function setUpEntries() {
  at("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
}
