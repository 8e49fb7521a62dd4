// The page at `/admin`.

import { askJson, setUpKeyForm, useAdminKey } from "./api.js";
import { at, bytes, count, el, ratio, table } from "./dom.js";
import { search, setUpEntries } from "./entries.js";
import { prefixFigures, watch } from "./overview.js";
import { drawPrefixes } from "./prefixes.js";
import { setUpPurge } from "./purge.js";

useAdminKey();

async function drawStats() {
  const { tiers } = await askJson("stats");
  at("stats").replaceChildren(table(
    [["Tier"], ["Entries", true], ["Size", true], ["Limit", true], ["Hits", true], ["Hit ratio", true],
      ["Stored", true], ["Promoted", true], ["Demoted", true], ["Evicted", true], ["Errors", true]],
    tiers.map((tier) => [tier.tier, tier.entries, tier.bytes, tier.max_bytes, tier.hits,
      ratio(tier.hits, tier.hits + tier.misses), tier.stores, tier.promotions, tier.demotions,
      tier.evictions, tier.errors + (tier.damaged || 0)].map((value, index) => {
      if (typeof value !== "number") return value === undefined ? "–" : value;
      return index === 2 || index === 3 ? bytes(value) : count(value);
    }))));
}

// Returns paths and values of a nested object.
function flatten(value, path) {
  if (value !== null && typeof value === "object" && Object.keys(value).length) {
    return Object.entries(value).flatMap(([name, each]) => flatten(each, path ? `${path}.${name}` : name));
  }
  return [[path, typeof value === "string" ? value : JSON.stringify(value)]];
}

async function drawConfig() {
  at("config").replaceChildren(...flatten(await askJson("config"), "").map(([name, value]) =>
    el("div", {}, el("dt", {}, el("code", {}, name)), el("dd", {}, el("code", {}, value)))));
}

function drawPrefixTier(prefix) {
  at("prefix-tier").hidden = !prefix;
  if (prefix) at("prefix-figures").replaceChildren(prefixFigures(prefix));
}

let isShown = false;
const refresh = watch(async ({ tier_names: names, prefix }) => {
  drawPrefixTier(prefix);
  await Promise.all([drawStats(), drawPrefixes()]);
  if (isShown) return;
  isShown = true;
  document.querySelector("#search [name=tier]").append(...names.map((name) => el("option", {}, name)));
  await Promise.all([drawConfig(), search()]);
});
setUpKeyForm(refresh);
setUpEntries();
setUpPurge(() => { refresh(); search(); });
