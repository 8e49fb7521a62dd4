// What prompts begin with that engines are asked for most.

import { askJson } from "./api.js";
import { at, count, duration, el, ratio, table } from "./dom.js";

const HEADS = [["Begins with"], ["Asked for", true], ["Characters", true], ["Tokens, about", true],
  ["Reused", true], ["Model"], ["Tenant"], ["Last", true]];

const row = (prefix) => [
  el("span", { class: "preview" }, prefix.preview), count(prefix.requests), count(prefix.characters),
  prefix.tokens === null ? "–" : count(prefix.tokens),
  prefix.reused_ratio === null ? "–" : ratio(prefix.reused_ratio, 1),
  prefix.model, prefix.tenant, `${duration(Math.max(0, Date.now() / 1000 - prefix.asked_at))} ago`,
];

export async function drawPrefixes() {
  const { prefixes } = await askJson("prefixes");
  at("prefixes").replaceChildren(prefixes.length
    ? table(HEADS, prefixes.map(row)) : el("p", { class: "quiet" }, "No two prompts have begun alike yet."));
}
