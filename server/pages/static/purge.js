// Purges, after a confirmation.

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

// Purges the entries with a label once the user has confirmed it. Returns whether they were purged.
export async function askToPurge(kind, name) {
  const what = kind === "all" ? "all entries in all tiers" : `all entries with the ${kind} «${name}»`;
  if (!(await isConfirmed(kind === "key" ? `Purge the entry «${name}»?` : `Purge ${what}?`))) return false;
  const status = at("purged");
  try {
    await askJson("purge", { method: "POST", body: kind === "all" ? { all: true } : { [kind]: name } });
    status.className = "";
    status.textContent = `Purged: ${kind === "all" ? "everything" : `${kind} ${name}`}.`;
  } catch (failed) {
    status.className = "error";
    status.textContent = failed.message;
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
