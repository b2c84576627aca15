// Payments by hand, with their requests and responses.

import { $, element } from "./format.js";

const base = document.body.dataset.url;
const exchangesMax = 4;
const shown = ["content-type", "location", "idempotency-status", "idempotent-replayed", "idempotency-created-at", "idempotency-expires-at", "retry-after"];

// randomUUID exists only on secure origins, but a phone may open the page through plain HTTP.
function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

const transfer = (amount) => JSON.stringify({ from: "alice", to: "bob", amount });

async function post(path, key, body) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  const request = [`POST ${path}`, ...Object.entries(headers).map(([name, value]) => `${name}: ${value}`), "", body];
  let status = "";
  let answer;
  try {
    const response = await fetch(path, { method: "POST", headers, body });
    const text = await response.text();
    status = response.headers.get("Idempotency-Status") || (response.ok ? "executed, unprotected" : "failed");
    answer = [`${response.status} ${response.statusText}`, ...shown.filter((name) => response.headers.has(name)).map((name) => `${title(name)}: ${response.headers.get(name)}`), "", text.trim()];
  } catch {
    status = "no answer";
    answer = ["The bank did not answer. Send it again: the key stays the same."];
  }
  show(status, request, answer);
}

const title = (name) => name.replace(/(^|-)[a-z]/g, (letters) => letters.toUpperCase());

function show(status, request, answer) {
  const pane = (name, lines) => {
    const text = element("pre");
    for (const line of lines) {
      text.append(/^(Idempotency-(Key|Status)|Idempotent-Replayed):/.test(line) ? element("mark", {}, line) : line, "\n");
    }
    return element("div", {}, element("h4", {}, name), text);
  };
  const kinds = { executed: "good", replayed: "good", "in-progress": "warn", mismatch: "warn" };
  const head = element("h3", { class: kinds[status] || "bad" }, status);
  $("exchanges").prepend(element("li", { "data-status": status }, head, element("div", { class: "panes" }, pane("Request", request), pane("Answer", answer))));
  while ($("exchanges").childElementCount > exchangesMax) $("exchanges").lastElementChild.remove();
}

export function prepareHand() {
  let key = "";
  const fresh = () => {
    key = newKey();
    $("again").disabled = $("changed").disabled = false;
  };
  $("send").onclick = () => { fresh(); post("/v1/transfers", key, transfer(1250)); };
  $("again").onclick = () => post("/v1/transfers", key, transfer(1250));
  $("changed").onclick = () => post("/v1/transfers", key, transfer(9900));
  $("twice").onclick = () => { fresh(); post("/v1/transfers", key, transfer(1250)); post("/v1/transfers", key, transfer(1250)); };
  $("bare").onclick = async () => {
    const other = newKey();
    await post("/v1/unprotected/transfers", other, transfer(1250));
    await post("/v1/unprotected/transfers", other, transfer(1250));
  };
  $("curl-transfer").textContent =
    `curl -i ${base}/v1/transfers -H 'Content-Type: application/json' -H 'Idempotency-Key: ${newKey()}' -d '${transfer(1250)}'`;
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.onclick = async () => {
      const source = $(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    };
  }
}
