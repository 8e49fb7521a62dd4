// The page at `/`.

import { askJson, keyForm } from "./api.js";
import { el } from "./dom.js";
import { watch } from "./overview.js";
import { setUp } from "./try.js";

const models = document.querySelector("#try [name=model]");
let listedFor = null;

function offer(names) {
  const chosen = models.value;
  models.replaceChildren(...names.map((name) => el("option", { selected: name === chosen }, name)));
}

// Asks for the models, aliases and adapters whenever an engine's state has changed.
async function listModels({ models: described }) {
  const states = JSON.stringify(described.map(({ state }) => state));
  if (listedFor === states) return;
  listedFor = states;
  // For whoever sends a prompt before the list has come.
  if (!models.value) offer(described.map(({ name }) => name));
  try { offer((await askJson("v1/models")).data.map((each) => each.id)); } catch { listedFor = null; }
}

const again = watch(listModels);
keyForm(again);
setUp(again);
