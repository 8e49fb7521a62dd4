// The prompt box: streams an answer, and says who gave it and how fast.

import { ask } from "./api.js";
import { at, count, duration, el } from "./dom.js";
import { eventIn, saidIn } from "./said.js";

const KEPT = 6;
const misses = new Map();

// «tierserve; hit; ttl=5; detail=memory»: the last cache is the nearest (RFC 9211).
function answeredBy(status) {
  const ours = status.split(",").pop();
  const detail = /detail=([\w-]+)/.exec(ours);
  if (/;\s*hit/.test(ours)) return [`${detail ? detail[1] : "a tier"}`, "hit"];
  const why = /fwd=([\w-]+)/.exec(ours);
  if (why && why[1] === "stale" && detail) return [detail[1], "stale"];
  return ["engine", why ? why[1] : "miss"];
}

async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const event = eventIn(part);
      if (event !== null) yield event;
    }
  }
}

function card() {
  const told = { by: el("dd"), first: el("dd"), total: el("dd"), tokens: el("dd") };
  const text = el("p", { class: "text" });
  const why = el("p", { class: "quiet" });
  const title = el("h3", {}, "…");
  const made = el("article", { class: "answer" }, title,
    el("dl", {}, el("dt", {}, "Cache-Status"), told.by, el("dt", {}, "First token"), told.first,
      el("dt", {}, "Total"), told.total, el("dt", {}, "Tokens"), told.tokens),
    why, text);
  return { made, title, told, text, why };
}

async function send(body, shown) {
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  const response = await ask("v1/chat/completions", { method: "POST", body });
  const status = response.headers.get("Cache-Status") || "";
  const [who, how] = answeredBy(status);
  shown.title.textContent = who === "engine" ? `Answered by the engine (${how})` : `Answered by ${who} (${how})`;
  shown.told.by.textContent = status || "–";
  if (how === "bypass") shown.why.textContent = "It asks for chance, so no tier was asked and none keeps it.";
  let first = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const piece = saidIn(event);
    if (piece) {
      if (first === null) { first = since(); shown.told.first.textContent = duration(first); }
      shown.text.append(piece);
    }
    if (event.usage) shown.told.tokens.textContent = count(event.usage.completion_tokens || 0);
  }
  const total = since();
  shown.told.total.textContent = duration(total);
  const asked = JSON.stringify(body);
  if (misses.size > 100) misses.clear();
  if (who === "engine") misses.set(asked, total);
  else if (misses.has(asked)) {
    shown.told.total.textContent += `, ${count(misses.get(asked) / total)} times as fast as the engine`;
  }
}

// Sets up the form; `then` is called after each answer.
export function setUp(then) {
  const form = at("try");
  const answers = at("answers");
  const problem = form.querySelector(".error");
  const button = form.querySelector("button");
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.disabled) return;
    const { model, prompt, temperature, max_tokens: most } = form.elements;
    const body = {
      model: model.value,
      messages: [{ role: "user", content: prompt.value }],
      temperature: Number(temperature.value),
      max_tokens: Number(most.value) || 64,
      stream: true,
      stream_options: { include_usage: true },
    };
    problem.textContent = "";
    button.disabled = true;
    const shown = card();
    answers.prepend(shown.made);
    while (answers.children.length > KEPT) answers.lastElementChild.remove();
    try {
      await send(body, shown);
    } catch (failed) {
      problem.textContent = failed.message;
      if (!shown.text.textContent) shown.made.remove();
    } finally {
      button.disabled = false;
      then();
    }
  });
}
