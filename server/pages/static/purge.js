// Purging, after having asked.

import { askJson } from "./api.js";
import { at } from "./dom.js";

let then = () => {};

function isConfirmed(text) {
  const dialog = at("confirm");
  at("confirm-text").textContent = text;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "purge"), { once: true });
  });
}

// Purges what has this name, if the user says so; returns whether it was done.
export async function askToPurge(kind, name) {
  const what = kind === "all" ? "everything, in all tiers" : `everything with the ${kind} «${name}»`;
  if (!(await isConfirmed(kind === "key" ? `Purge the entry «${name}»?` : `Purge ${what}?`))) return false;
  const told = at("purged");
  try {
    await askJson("purge", { method: "POST", body: kind === "all" ? { all: true } : { [kind]: name } });
    told.className = "";
    told.textContent = `Purged: ${kind === "all" ? "everything" : `${kind} ${name}`}.`;
  } catch (failed) {
    told.className = "error";
    told.textContent = failed.message;
    return false;
  }
  then();
  return true;
}

export function setUpPurge(after) {
  then = after;
  const form = at("purge");
  const { kind, name } = form.elements;
  kind.addEventListener("change", () => { name.disabled = kind.value === "all"; });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    askToPurge(kind.value, name.value.trim());
  });
}
