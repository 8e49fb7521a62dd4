// Asking the server, with the key of this tab. No cookie is ever set.

import { at } from "./dom.js";

let storedAs = "tierserve-key";
let isAlwaysNeeded = false;

// Has this page use the admin key, without which nothing is worth asking.
export function useAdminKey() {
  storedAs = "tierserve-admin-key";
  isAlwaysNeeded = true;
}

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function ask(path, { method = "GET", body = null } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(storedAs);
  if (isAlwaysNeeded && !key) throw new ApiError(401, "");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== null) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, credentials: "omit", body: body === null ? null : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, "The server doesn't answer.");
  }
  if (response.ok) return response;
  let message = `The server says ${response.status}.`;
  try { message = (await response.json()).error.message || message; } catch { /* No error of ours. */ }
  throw new ApiError(response.status, message);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// Shows the form for a key while one is needed; `then` goes on with a new one.
export function keyForm(then) {
  const form = at("key");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(storedAs, form.elements.key.value.trim());
    then();
  });
  at("forget").addEventListener("click", () => {
    sessionStorage.removeItem(storedAs);
    form.elements.key.value = "";
    then();
  });
}

export function showKeyForm(problem) {
  const form = at("key");
  const isNeeded = problem !== null && problem.status === 401;
  const wasGiven = sessionStorage.getItem(storedAs) !== null;
  if (isNeeded && form.hidden && !wasGiven) queueMicrotask(() => form.elements.key.focus());
  form.hidden = !isNeeded;
  at("forget").hidden = isNeeded || !wasGiven;
  form.querySelector(".error").textContent = isNeeded && wasGiven ? problem.message : "";
  return isNeeded;
}
