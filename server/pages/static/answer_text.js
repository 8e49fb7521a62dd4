// The text of an answer, from a JSON body or an event stream of any route that generates text.

const list = (value) => (Array.isArray(value) ? value : []);

// Returns the JSON of a server-sent event, or null if it has none.
export function parseEvent(part) {
  const lines = part.split("\n").filter((line) => line.startsWith("data:"));
  const data = lines.map((line) => line.slice(5).trim()).join("\n");
  return data && data !== "[DONE]" ? JSON.parse(data) : null;
}

export function textOfEvent(event) {
  if (event.type === "response.output_text.delta") return event.delta;
  if (event.type === "content_block_delta") return event.delta.text || "";
  const { text, delta = {} } = list(event.choices)[0] || {};
  return text || (delta.reasoning || delta.reasoning_content || "") + (delta.content || "");
}

function textOfBody(body) {
  const { text, message } = list(body.choices)[0] || {};
  if (text || message) return text || message.content || "";
  const parts = [...list(body.output).flatMap((item) => list(item.content)), ...list(body.content)];
  return parts.map((part) => part.text || "").join("");
}

// Returns the text of an answer as clients get it, or "" if it has none, such as an embedding.
export function textOf(content) {
  try {
    if (content.startsWith("{")) return textOfBody(JSON.parse(content));
    return content.split(/\r?\n\r?\n/).map(parseEvent).filter((event) => event !== null).map(textOfEvent).join("");
  } catch {
    return "";
  }
}
