// A bar chart of the last hours: the share of requests that each tier answered, by span of time.

import { count, el, ratio, svg } from "./dom.js";

const HEIGHT = 190, LEFT = 40, BOTTOM = 22, TOP = 6;
const BARS = 72;
const SPANS = [["1 h", 3600], ["6 h", 6 * 3600], ["24 h", 24 * 3600]];

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

// Adds up steps of the history to at most `BARS` spans, the last of which ends now.
function toSpans(history, names, seconds) {
  const steps = Math.round(seconds / history.step_s);
  const size = Math.max(1, Math.ceil(steps / BARS));
  const bars = Math.ceil(steps / size);
  return Array.from({ length: bars }, (_, bar) => {
    const part = (ring) => {
      const end = ring.length - (bars - 1 - bar) * size;
      return sum(ring.slice(Math.max(0, end - size), Math.max(0, end)));
    };
    return {
      endsAt: history.ends_at - (bars - 1 - bar) * size * history.step_s,
      seconds: size * history.step_s,
      counts: names.map((name) => part(history.answered[name] || [])),
    };
  });
}

const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

function bars(spans, names, right) {
  const width = (right - LEFT) / spans.length;
  const full = HEIGHT - TOP - BOTTOM;
  const gap = Math.min(2, width / 4);
  return spans.flatMap(({ endsAt, seconds, counts }, index) => {
    const whole = sum(counts);
    if (!whole) return [];
    let y = HEIGHT - BOTTOM;
    const parts = counts.map((number, tier) => {
      const height = (full * number) / whole;
      y -= height;
      const isRest = tier === names.length - 1;
      return svg("rect", { class: isRest ? "rest" : `s${tier}`, x: LEFT + index * width, y, width: width - gap, height });
    });
    const shares = names.map((name, tier) => `${name} ${ratio(counts[tier], whole)}`).join(", ");
    return [svg("g", {}, svg("title", {}, `${clock(endsAt - seconds)}: ${count(whole)} requests, ${shares}`), ...parts)];
  });
}

function axes(spans, right) {
  const lines = [0, 0.5, 1].flatMap((part) => {
    const y = HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM);
    return [svg("line", { x1: LEFT, x2: right, y1: y, y2: y }),
      svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, `${part * 100} %`)];
  });
  const width = (right - LEFT) / spans.length;
  const times = (right > 480 ? [0, 0.25, 0.5, 0.75] : [0, 0.5]).map((part) => {
    const index = Math.round(part * spans.length);
    const { endsAt, seconds } = spans[index];
    return svg("text", { x: LEFT + index * width, y: HEIGHT - 5 }, clock(endsAt - seconds));
  });
  const now = svg("text", { x: right, y: HEIGHT - 5, "text-anchor": "end" }, "now");
  return [...lines, ...times, now];
}

// Returns the chart of the last `seconds`. `tiers` are names, nearest first; `width` is in pixels.
export function chart(history, tiers, seconds, width) {
  const names = [...tiers, "engine"];
  const spans = toSpans(history, names, seconds);
  const totals = names.map((_, tier) => sum(spans.map((span) => span.counts[tier])));
  const whole = sum(totals);
  const labels = names.map((name, tier) => `${name} ${ratio(totals[tier], whole)}`);
  return el("div", {},
    svg("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Answered by ${labels.join(", ")}` },
      ...axes(spans, width), ...bars(spans, names, width)),
    el("ul", { class: "legend" }, ...names.map((name, tier) =>
      el("li", {}, el("i", { class: tier === names.length - 1 ? "rest" : `s${tier}` }), labels[tier]))));
}

export { SPANS, sum };
