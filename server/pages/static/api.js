// Requests to the server, with the key of this tab. The pages set no cookies.

import { at } from "./dom.js";

let storageKey = "tierserve-key";
let isKeyRequired = false;

// Makes this page use the admin key, and send no requests without one.
export function useAdminKey() {
  storageKey = "tierserve-admin-key";
  isKeyRequired = true;
}

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function ask(path, { method = "GET", body = null } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(storageKey);
  if (isKeyRequired && !key) throw new ApiError(401, "");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== null) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method, headers, credentials: "omit", body: body === null ? null : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try { message = (await response.json()).error.message || message; } catch { /* Not an error in OpenAI's shape. */ }
  throw new ApiError(response.status, message);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// Sets up the form for a key; calls `then` when the key has changed.
export function setUpKeyForm(then) {
  const form = at("key");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(storageKey, form.elements.key.value.trim());
    then();
  });
  at("forget").addEventListener("click", () => {
    sessionStorage.removeItem(storageKey);
    form.elements.key.value = "";
    then();
  });
}

// Shows the form for a key if the server refused the last request for the lack of one (`problem`), and
// hides it otherwise. Returns whether it is shown.
export function showKeyForm(problem) {
  const form = at("key");
  const isNeeded = problem !== null && problem.status === 401;
  const wasGiven = sessionStorage.getItem(storageKey) !== null;
  if (isNeeded && form.hidden && !wasGiven) queueMicrotask(() => form.elements.key.focus());
  form.hidden = !isNeeded;
  at("forget").hidden = isNeeded || !wasGiven;
  form.querySelector(".error").textContent = isNeeded && wasGiven ? problem.message : "";
  return isNeeded;
}
