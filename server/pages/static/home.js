// The page at `/`.

import { askJson, setUpKeyForm } from "./api.js";
import { el } from "./dom.js";
import { watch } from "./overview.js";
import { setUpTry } from "./try.js";

const models = document.querySelector("#try [name=model]");
// The engines' states when the models were listed.
let listedStates = null;

function showModels(names) {
  const chosen = models.value;
  models.replaceChildren(...names.map((name) => el("option", { selected: name === chosen }, name)));
}

// Lists the models, aliases and adapters again whenever an engine's state has changed.
async function listModels({ models: engines }) {
  const states = JSON.stringify(engines.map(({ state }) => state));
  if (listedStates === states) return;
  listedStates = states;
  // For prompts that are sent before the list arrives.
  if (!models.value) showModels(engines.map(({ name }) => name));
  try { showModels((await askJson("v1/models")).data.map((each) => each.id)); } catch { listedStates = null; }
}

const refresh = watch(listModels);
setUpKeyForm(refresh);
setUpTry(refresh);
