// The page at `/docs`: the OpenAPI document, each part of which is drawn when it is opened.

import { askJson, keyForm, showKeyForm } from "./api.js";
import { at, el } from "./dom.js";

let about = null;

const resolve = (part) => {
  let found = part;
  for (let depth = 0; found && found.$ref && depth < 8; depth += 1) {
    found = found.$ref.split("/").slice(1).reduce((at_, name) =>
      (at_ || {})[name.replaceAll("~1", "/").replaceAll("~0", "~")], about);
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

// The objects in a schema whose fields are worth opening.
function objectsIn(schema, depth = 0) {
  const found = resolve(schema);
  if (found.properties) return [found];
  if (depth > 3) return [];
  const parts = [...(found.allOf || []), ...(found.anyOf || []), ...(found.oneOf || [])];
  if (found.items) parts.push(found.items);
  return parts.flatMap((part) => objectsIn(part, depth + 1));
}

function opened(summary, draw, attributes = {}) {
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
      const told = [el("code", {}, name), ` ${typeOf(field)}`,
        isRequired ? ", required" : "",
        field.default !== undefined && field.default !== null ? `, default ${JSON.stringify(field.default)}` : ""];
      const text = field.description || (field.$ref ? "" : found.description) || "";
      if (text) told.push(el("span", { class: "quiet" }, ` – ${text}`));
      return el("li", {}, objectsIn(field).length ? opened(told, () => fields(field)) : el("span", {}, ...told));
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

function operation(path, method, told) {
  const draw = () => {
    const parameters = (told.parameters || []).map(resolve);
    return el("div", {},
      told.description ? el("p", {}, told.description) : null,
      ...(parameters.length ? [el("h3", {}, "Parameters"), el("ul", {}, ...parameters.map((each) =>
        el("li", {}, el("code", {}, each.name), ` in ${each.in}${each.required ? ", required" : ""}`,
          each.description ? el("span", { class: "quiet" }, ` – ${each.description}`) : null)))] : []),
      ...(told.requestBody ? [el("h3", {}, "Request"), ...body("Body", told.requestBody.content)] : []),
      el("h3", {}, "Responses"),
      el("ul", {}, ...Object.entries(told.responses || {}).map(([status, each]) => {
        const found = resolve(each);
        const headers = Object.keys(found.headers || {});
        return el("li", {}, el("strong", {}, status), ` ${found.description || ""}`,
          el("span", { class: "quiet" }, headers.length ? ` – headers ${headers.join(", ")}` : ""),
          status.startsWith("2") ? el("div", {}, ...body("Body", found.content)) : null);
      })));
  };
  const summary = [el("span", { class: "method" }, method.toUpperCase()), el("code", {}, path),
    el("span", { class: "quiet" }, ` ${told.summary || ""}`)];
  return opened(summary, draw, { class: "operation", "data-route": `${method} ${path} ${told.summary || ""}`.toLowerCase() });
}

function draw() {
  at("about").textContent = `version ${about.info.version}`;
  const all = Object.entries(about.paths).flatMap(([path, item]) =>
    Object.entries(item).filter(([, told]) => told.responses).map(([method, told]) => ({ path, method, told })));
  at("routes").replaceChildren(...about.tags.map(({ name }) =>
    el("section", { class: "card" }, el("h2", {}, name),
      ...all.filter(({ told }) => told.tags.includes(name)).map(({ path, method, told }) => operation(path, method, told)))));
  find();
}

function find() {
  const text = at("find").value.trim().toLowerCase();
  for (const route of document.querySelectorAll(".operation")) route.hidden = !route.dataset.route.includes(text);
  for (const card of document.querySelectorAll("#routes > .card")) card.hidden = !card.querySelector(".operation:not([hidden])");
}

async function load() {
  try {
    about = await askJson("openapi.json");
    showKeyForm(null);
    draw();
  } catch (problem) {
    if (!showKeyForm(problem)) at("about").textContent = problem.message;
    else at("routes").replaceChildren();
  }
}

at("find").addEventListener("input", find);
keyForm(load);
load();
