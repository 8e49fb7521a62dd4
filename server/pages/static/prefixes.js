// The most frequent beginnings of prompts that reached an engine.

import { askJson } from "./api.js";
import { at, count, duration, el, ratio, table } from "./dom.js";

const HEADS = [["Begins with"], ["Requests", true], ["Characters", true], ["Tokens (estimate)", true],
  ["Reused", true], ["Model"], ["Tenant"], ["Last request", true]];

const row = (prefix) => [
  el("span", { class: "preview" }, prefix.preview), count(prefix.requests), count(prefix.characters),
  prefix.tokens === null ? "–" : count(prefix.tokens),
  prefix.reused_ratio === null ? "–" : ratio(prefix.reused_ratio, 1),
  prefix.model, prefix.tenant, `${duration(Math.max(0, Date.now() / 1000 - prefix.asked_at))} ago`,
];

export async function drawPrefixes() {
  const { prefixes } = await askJson("prefixes");
  at("prefixes").replaceChildren(prefixes.length
    ? table(HEADS, prefixes.map(row)) : el("p", { class: "quiet" }, "No two prompts have had the same beginning yet."));
}
