// The prompt form: streams an answer, and shows which tier answered and how fast.

import { ask } from "./api.js";
import { at, count, duration, el } from "./dom.js";
import { parseEvent, textOfEvent } from "./answer_text.js";

const MAX_ANSWERS = 6;
// Seconds that the engine took, by request.
const engineSeconds = new Map();

// Parses a Cache-Status such as `tierserve; hit; ttl=5; detail=memory` (RFC 9211): the last cache
// in it is the nearest. Returns who answered, and how.
function parseCacheStatus(status) {
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
      const event = parseEvent(part);
      if (event !== null) yield event;
    }
  }
}

function card() {
  const values = { status: el("dd"), first: el("dd"), total: el("dd"), tokens: el("dd") };
  const text = el("p", { class: "text" });
  const why = el("p", { class: "quiet" });
  const title = el("h3", {}, "…");
  const article = el("article", { class: "answer" }, title,
    el("dl", {}, el("dt", {}, "Cache-Status"), values.status, el("dt", {}, "First token"), values.first,
      el("dt", {}, "Total"), values.total, el("dt", {}, "Tokens"), values.tokens),
    why, text);
  return { article, title, values, text, why };
}

async function send(body, shown) {
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  const response = await ask("v1/chat/completions", { method: "POST", body });
  const status = response.headers.get("Cache-Status") || "";
  const [who, how] = parseCacheStatus(status);
  shown.title.textContent = who === "engine" ? `Answered by the engine (${how})` : `Answered by ${who} (${how})`;
  shown.values.status.textContent = status || "–";
  if (how === "bypass") shown.why.textContent = "Not cached: with this temperature, each answer is random.";
  let first = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const text = textOfEvent(event);
    if (text) {
      if (first === null) { first = since(); shown.values.first.textContent = duration(first); }
      shown.text.append(text);
    }
    if (event.usage) shown.values.tokens.textContent = count(event.usage.completion_tokens || 0);
  }
  const total = since();
  shown.values.total.textContent = duration(total);
  const request = JSON.stringify(body);
  if (engineSeconds.size > 100) engineSeconds.clear();
  if (who === "engine") engineSeconds.set(request, total);
  else if (engineSeconds.has(request)) {
    shown.values.total.textContent += `, ${count(engineSeconds.get(request) / total)} times as fast as the engine`;
  }
}

// Sets up the form; calls `then` after each answer.
export function setUpTry(then) {
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
    const { model, prompt, temperature, max_tokens: maxTokens } = form.elements;
    const body = {
      model: model.value,
      messages: [{ role: "user", content: prompt.value }],
      temperature: Number(temperature.value),
      max_tokens: Number(maxTokens.value) || 64,
      stream: true,
      stream_options: { include_usage: true },
    };
    problem.textContent = "";
    button.disabled = true;
    const shown = card();
    answers.prepend(shown.article);
    while (answers.children.length > MAX_ANSWERS) answers.lastElementChild.remove();
    try {
      await send(body, shown);
    } catch (failed) {
      problem.textContent = failed.message;
      if (!shown.text.textContent) shown.article.remove();
    } finally {
      button.disabled = false;
      then();
    }
  });
}
