// Searching the tiers, and looking at an entry, whose content is shown as text whatever it is.

import { askJson } from "./api.js";
import { at, bytes, count, duration, el, table } from "./dom.js";
import { askToPurge } from "./purge.js";
import { said } from "./said.js";

const PAGE = 50;
const HEADS = [["Key"], ["Asked for", true], ["Tiers"], ["Size", true], ["Age", true], ["Good for", true], ["Labels"]];
let query = {};

function query_of(form) {
  const { by, text, tier } = form.elements;
  const made = { limit: PAGE };
  const given = text.value.trim();
  if (given) made[by.value === "prefix" ? "prefix" : "label"] = by.value === "prefix" ? given : `${by.value}:${given}`;
  if (tier.value) made.tier = tier.value;
  return made;
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
    const asked = new URLSearchParams(after ? { ...query, after } : query);
    const found = await askJson(`entries?${asked}`);
    const drawn = table(HEADS, found.entries.map(row));
    const old = after ? at("entries").querySelector("tbody") : null;
    if (old) old.append(...drawn.querySelectorAll("tbody tr"));
    else at("entries").replaceChildren(found.entries.length || found.after ? drawn : el("p", { class: "quiet" }, "There is none."));
    const more = at("more");
    more.hidden = !found.after;
    more.onclick = () => page(found.after);
  } catch (failed) {
    problem.textContent = failed.message;
  }
}

export async function search() {
  query = query_of(at("search"));
  await page("");
}

// A browser takes seconds to lay out a megabyte.
const MOST = 100_000;

const cut = (text) =>
  (text.length > MOST ? `${text.slice(0, MOST)}\n… and ${count(text.length - MOST)} characters more` : text);

function readable(content) {
  let text = content;
  try { text = JSON.stringify(JSON.parse(content), null, 2); } catch { /* Events. */ }
  return cut(text);
}

async function show(key) {
  const shown = at("entry");
  try {
    const entry = await askJson(`entries/${encodeURIComponent(key)}`);
    const close = () => { shown.replaceChildren(); };
    const text = said(entry.content);
    shown.replaceChildren(
      el("h3", {}, "Entry ", el("span", { class: "key" }, entry.key)),
      el("p", {}, `${entry.state}, stored ${new Date(entry.stored_at * 1000).toLocaleString()}, took ${duration(entry.took_s)}, `,
        `in ${entry.tiers.join(" and ") || "no tier that can tell"}. Labels: ${entry.labels.join(", ") || "none"}.`),
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
