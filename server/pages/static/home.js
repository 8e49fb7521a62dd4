// The page at `/`.

import { askJson, keyForm } from "./api.js";
import { el } from "./dom.js";
import { watch } from "./overview.js";
import { setUp } from "./try.js";

const models = document.querySelector("#try [name=model]");
let listedFor = null;

// Asks for the models, aliases and adapters whenever an engine's state has changed.
async function listModels({ models: described }) {
  const states = JSON.stringify(described.map(({ state }) => state));
  if (listedFor === states) return;
  listedFor = states;
  let names = described.map(({ name }) => name);
  try { names = (await askJson("v1/models")).data.map((each) => each.id); } catch { listedFor = null; }
  const chosen = models.value;
  models.replaceChildren(...names.map((name) => el("option", { selected: name === chosen }, name)));
}

const again = watch(listModels);
keyForm(again);
setUp(again);
