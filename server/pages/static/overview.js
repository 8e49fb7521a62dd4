// What both pages show at a glance, kept up to date.

import { askJson, showKeyForm } from "./api.js";
import { SPANS, chart, sum } from "./chart.js";
import { at, bytes, count, duration, el, ratio, table } from "./dom.js";

const EVERY_MS = 5000;
let last = null;

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
  return el("dl", { class: "figures" }, ...shown.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

// Made once, so that who has the focus on it keeps it.
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
    last.tiers.map((tier) => [tier.tier, tier.available ? "in use" : "left out, since it fails",
      tier.entries === undefined ? "–" : count(tier.entries), tier.bytes === undefined ? "–" : bytes(tier.bytes)])));
}

// Of all engines: that of the one which is least ready.
export const stateOf = (models) =>
  ["down", "starting"].find((state) => models.some((model) => model.state === state)) || "ready";

const notReady = (models) =>
  models.filter(({ state }) => state !== "ready").map(({ name, state }) => `${name} ${state}`).join(", ");

// Keeps the overview up to date; `then` is told of each.
export function watch(then) {
  let timer = null;
  const badge = at("engine");
  const state = (text, is) => {
    if (badge.textContent !== text) badge.textContent = text;
    badge.dataset.is = is;
  };
  async function again() {
    clearTimeout(timer);
    try {
      last = await askJson("overview");
      showKeyForm(null);
      // Before it is drawn, since a chart is as wide as there is room.
      at("all").hidden = false;
      const is = stateOf(last.models);
      state(last.models.length > 1 && is !== "ready" ? notReady(last.models) : `engine ${is}`, is);
      const restarts = sum(last.models.map((model) => model.restarts));
      at("about").textContent = `version ${last.version}${restarts ? `, engine started again ${restarts === 1 ? "once" : `${count(restarts)} times`}` : ""}`;
      drawDay();
      drawTiers();
      then(last);
    } catch (problem) {
      if (showKeyForm(problem)) {
        state("locked", "");
        at("all").hidden = true;
        at("about").textContent = "";
        // Whoever gives a key looks again.
        return;
      }
      state(problem.status ? problem.message : "no connection", "down");
    }
    timer = document.hidden ? null : setTimeout(again, EVERY_MS);
  }
  addEventListener("resize", () => { if (last) drawDay(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) again(); });
  again();
  return again;
}
