// The text of an answer, of any route that generates: whole, or in events.

const list = (value) => (Array.isArray(value) ? value : []);

// What an event of a stream holds, if it is JSON: server-sent events, from one blank line to the next.
export function eventIn(part) {
  const lines = part.split("\n").filter((line) => line.startsWith("data:"));
  const data = lines.map((line) => line.slice(5).trim()).join("\n");
  return data && data !== "[DONE]" ? JSON.parse(data) : null;
}

export function saidIn(event) {
  if (event.type === "response.output_text.delta") return event.delta;
  if (event.type === "content_block_delta") return event.delta.text || "";
  const { text, delta = {} } = list(event.choices)[0] || {};
  return text || (delta.reasoning || delta.reasoning_content || "") + (delta.content || "");
}

function saidInBody(body) {
  const { text, message } = list(body.choices)[0] || {};
  if (text || message) return text || message.content || "";
  const parts = [...list(body.output).flatMap((item) => list(item.content)), ...list(body.content)];
  return parts.map((part) => part.text || "").join("");
}

// Returns the text of an answer as clients get it; nothing where it has none, such as vectors.
export function said(content) {
  try {
    if (content.startsWith("{")) return saidInBody(JSON.parse(content));
    return content.split(/\r?\n\r?\n/).map(eventIn).filter((event) => event !== null).map(saidIn).join("");
  } catch {
    return "";
  }
}
