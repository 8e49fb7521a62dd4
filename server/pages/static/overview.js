// The engine's state and the numbers of the last 24 hours, on both pages, refreshed every 5 seconds.

import { askJson, showKeyForm } from "./api.js";
import { SPANS, chart, sum } from "./chart.js";
import { at, bytes, count, duration, el, ratio, table } from "./dom.js";

const REFRESH_MS = 5000;
// The last overview.
let last = null;

const asFigures = (shown) => el("dl", { class: "figures" }, ...shown.map(([name, value]) =>
  el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function figures(history) {
  const answered = Object.entries(history.answered);
  const all = sum(answered.flatMap(([, ring]) => ring));
  const byTiers = sum(answered.flatMap(([name, ring]) => (name === "engine" ? [] : ring)));
  const shown = [
    ["Requests", count(all)],
    ["Answered by tiers", ratio(byTiers, all)],
    ["Tokens saved", count(sum(history.tokens_saved))],
    ["Generation time saved", duration(sum(history.seconds_saved))],
  ];
  return asFigures(shown);
}

// The prefix tier keeps what engines have computed of prompts' beginnings.
export function prefixFigures(prefix) {
  const shown = [
    ["State", prefix.available ? "in use" : "can't be read"],
    ["Blocks", count(prefix.blocks)],
    ["Size", `${bytes(prefix.bytes)} of ${bytes(prefix.max_bytes)}`],
    ["Prompt tokens loaded", ratio(prefix.loaded_tokens, prefix.queried_tokens)],
    ["Computing time saved", duration(prefix.saved_seconds)],
  ];
  return asFigures(shown);
}

// Created once, so that it keeps the keyboard focus.
const choice = el("select", { "aria-label": "Time shown", onchange: () => drawDay() },
  ...SPANS.map(([name, seconds]) => el("option", { value: seconds }, `last ${name}`)));
const title = el("h3");
const numbers = el("div");
const drawn = el("div");

function drawDay() {
  const day = at("day");
  if (!day.children.length) {
    day.append(numbers, el("div", { class: "chart-head" }, title, el("div", {}, choice)), drawn);
  }
  title.textContent = last.tenant ? `Who answered ${last.tenant}` : "Who answered";
  numbers.replaceChildren(figures(last.history));
  const width = Math.max(280, day.clientWidth);
  drawn.replaceChildren(chart(last.history, last.tier_names, Number(choice.value), width));
}

function drawTiers() {
  const held = at("held");
  if (held === null) return;
  held.hidden = !last.tiers;
  if (!last.tiers) return;
  at("tiers").replaceChildren(table(
    [["Tier"], ["State"], ["Entries", true], ["Size", true]],
    last.tiers.map((tier) => [tier.tier, tier.available ? "in use" : "bypassed after failures",
      tier.entries === undefined ? "–" : count(tier.entries), tier.bytes === undefined ? "–" : bytes(tier.bytes)])),
  ...(last.prefix ? [el("h3", {}, "Prefix tier"), prefixFigures(last.prefix)] : []));
}

// Returns the state of the engine that is furthest from ready.
export const stateOf = (models) =>
  ["down", "starting"].find((state) => models.some((model) => model.state === state)) || "ready";

const notReady = (models) =>
  models.filter(({ state }) => state !== "ready").map(({ name, state }) => `${name} ${state}`).join(", ");

// Keeps the overview up to date, and calls `then` with each new one. Returns a function that
// refreshes it at once.
export function watch(then) {
  let timer = null;
  let asked = 0;
  const badge = at("engine");
  const showState = (text, state) => {
    if (badge.textContent !== text) badge.textContent = text;
    badge.dataset.is = state;
  };
  async function refresh() {
    clearTimeout(timer);
    asked += 1;
    const turn = asked;
    try {
      const overview = await askJson("overview");
      // With another key, or without one, it has been asked for again meanwhile.
      if (turn !== asked) return;
      last = overview;
      showKeyForm(null);
      // Shown before it is drawn, since the chart needs the width.
      at("all").hidden = false;
      const state = stateOf(last.models);
      showState(last.models.length > 1 && state !== "ready" ? notReady(last.models) : `engine ${state}`, state);
      const restarts = sum(last.models.map((model) => model.restarts));
      at("about").textContent = `version ${last.version}${restarts ? `, engine restarted ${restarts === 1 ? "once" : `${count(restarts)} times`}` : ""}`;
      drawDay();
      drawTiers();
      then(last);
    } catch (problem) {
      if (turn !== asked) return;
      if (showKeyForm(problem)) {
        showState("locked", "");
        at("all").hidden = true;
        at("about").textContent = "";
        // The form for a key refreshes.
        return;
      }
      showState(problem.status ? problem.message : "no connection", "down");
    }
    timer = document.hidden ? null : setTimeout(refresh, REFRESH_MS);
  }
  addEventListener("resize", () => { if (last) drawDay(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
  refresh();
  return refresh;
}
