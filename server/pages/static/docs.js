// The page at `/docs`: shows the OpenAPI document, each part when it is opened.

import { askJson, setUpKeyForm, showKeyForm } from "./api.js";
import { at, el } from "./dom.js";

// The OpenAPI document.
let api = null;

// Follows a reference within the document.
const resolve = (part) => {
  let found = part;
  for (let depth = 0; found && found.$ref && depth < 8; depth += 1) {
    found = found.$ref.split("/").slice(1).reduce((at_, name) =>
      (at_ || {})[name.replaceAll("~1", "/").replaceAll("~0", "~")], api);
  }
  return found || {};
};

const named = (schema) => (schema.$ref ? schema.$ref.split("/").pop() : null);

function typeOf(schema) {
  if (named(schema)) return named(schema);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  const several = schema.anyOf || schema.oneOf;
  if (several) return [...new Set(several.map(typeOf))].join(" | ");
  if (schema.allOf) return schema.allOf.map(typeOf).filter((name) => name !== "object").join(" & ");
  if (schema.type === "array") return `array of ${schema.items ? typeOf(schema.items) : "any"}`;
  return Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type || "any";
}

// Returns the objects with fields that a schema consists of.
function objectsIn(schema, depth = 0) {
  const found = resolve(schema);
  if (found.properties) return [found];
  if (depth > 3) return [];
  const parts = [...(found.allOf || []), ...(found.anyOf || []), ...(found.oneOf || [])];
  if (found.items) parts.push(found.items);
  return parts.flatMap((part) => objectsIn(part, depth + 1));
}

// Returns a closed element that draws its content when it is first opened.
function collapsed(summary, draw, attributes = {}) {
  const details = el("details", attributes, el("summary", {}, ...summary));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(draw());
  });
  return details;
}

function fields(schema) {
  const objects = objectsIn(schema);
  const areSeveral = objects.filter(({ title }) => title).length > 1;
  const items = objects.flatMap((object) => [
    ...(areSeveral && object.title ? [el("li", { class: "title" }, object.title)] : []),
    ...Object.entries(object.properties).map(([name, field]) => {
      const found = resolve(field);
      const isRequired = (object.required || []).includes(name);
      const parts = [el("code", {}, name), ` ${typeOf(field)}`,
        isRequired ? ", required" : "",
        field.default !== undefined && field.default !== null ? `, default ${JSON.stringify(field.default)}` : ""];
      const text = field.description || (field.$ref ? "" : found.description) || "";
      if (text) parts.push(el("span", { class: "quiet" }, ` – ${text}`));
      return el("li", {}, objectsIn(field).length ? collapsed(parts, () => fields(field)) : el("span", {}, ...parts));
    })]);
  return el("ul", { class: "schema" }, ...items);
}

function body(title, content) {
  return Object.entries(content || {}).flatMap(([type, { schema }]) => {
    const what = schema && Object.keys(schema).length ? `: ${typeOf(schema)}` : "";
    const head = el("p", {}, `${title} `, el("code", {}, type), what);
    return schema && objectsIn(schema).length ? [head, fields(schema)] : [head];
  });
}

function operation(path, method, described) {
  const draw = () => {
    const parameters = (described.parameters || []).map(resolve);
    return el("div", {},
      described.description ? el("p", {}, described.description) : null,
      ...(parameters.length ? [el("h3", {}, "Parameters"), el("ul", {}, ...parameters.map((each) =>
        el("li", {}, el("code", {}, each.name), ` in ${each.in}${each.required ? ", required" : ""}`,
          each.description ? el("span", { class: "quiet" }, ` – ${each.description}`) : null)))] : []),
      ...(described.requestBody ? [el("h3", {}, "Request"), ...body("Body", described.requestBody.content)] : []),
      el("h3", {}, "Responses"),
      el("ul", {}, ...Object.entries(described.responses || {}).map(([status, each]) => {
        const found = resolve(each);
        const headers = Object.keys(found.headers || {});
        return el("li", {}, el("strong", {}, status), ` ${found.description || ""}`,
          el("span", { class: "quiet" }, headers.length ? ` – headers ${headers.join(", ")}` : ""),
          status.startsWith("2") ? el("div", {}, ...body("Body", found.content)) : null);
      })));
  };
  const summary = [el("span", { class: "method" }, method.toUpperCase()), el("code", {}, path),
    el("span", { class: "quiet" }, ` ${described.summary || ""}`)];
  return collapsed(summary, draw, { class: "operation", "data-route": `${method} ${path} ${described.summary || ""}`.toLowerCase() });
}

function draw() {
  at("about").textContent = `version ${api.info.version}`;
  const all = Object.entries(api.paths).flatMap(([path, item]) =>
    Object.entries(item).filter(([, described]) => described.responses).map(([method, described]) => ({ path, method, described })));
  at("routes").replaceChildren(...api.tags.map(({ name }) =>
    el("section", { class: "card" }, el("h2", {}, name),
      ...all.filter(({ described }) => described.tags.includes(name)).map(({ path, method, described }) => operation(path, method, described)))));
  find();
}

function find() {
  const text = at("find").value.trim().toLowerCase();
  for (const route of document.querySelectorAll(".operation")) route.hidden = !route.dataset.route.includes(text);
  for (const card of document.querySelectorAll("#routes > .card")) card.hidden = !card.querySelector(".operation:not([hidden])");
}

async function load() {
  try {
    api = await askJson("openapi.json");
    showKeyForm(null);
    draw();
  } catch (problem) {
    if (!showKeyForm(problem)) at("about").textContent = problem.message;
    else at("routes").replaceChildren();
  }
}

at("find").addEventListener("input", find);
setUpKeyForm(load);
load();
