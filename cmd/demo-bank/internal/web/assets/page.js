"use strict";

const base = document.body.dataset.url;
const $ = (id) => document.getElementById(id);
const money = (minor) => (Number(minor) / 100).toLocaleString("en", { minimumFractionDigits: 2 }) + " EUR";

// randomUUID exists on secure origins only; the bank may be looked at through plain HTTP from a phone.
function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

let lastKey = "";
const transfer = (amount) => JSON.stringify({ from: "alice", to: "bob", amount });

async function post(path, key, body) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers["Idempotency-Key"] = key;
  let response, text;
  try {
    response = await fetch(path, { method: "POST", headers, body });
    text = await response.text();
  } catch (error) {
    show("", "no answer", String(error));
    return;
  }
  const status = response.headers.get("Idempotency-Status") || "unprotected";
  const notes = ["Idempotent-Replayed", "Idempotency-Created-At", "Retry-After"]
    .filter((name) => response.headers.has(name))
    .map((name) => name + ": " + response.headers.get(name));
  show(response.status + " ", status, [...notes, text.trim()].join("\n"));
}

function show(code, status, detail) {
  const row = document.createElement("li");
  const badge = document.createElement("b");
  const kinds = { executed: "good", replayed: "good", unprotected: "warn", "in-progress": "warn", mismatch: "warn" };
  badge.textContent = status;
  badge.className = "badge " + (kinds[status] || "bad");
  const rest = document.createElement("span");
  rest.textContent = detail;
  rest.style.display = "block";
  rest.style.whiteSpace = "pre-wrap";
  row.append(code, badge, rest);
  $("answers").prepend(row);
  while ($("answers").childElementCount > 6) $("answers").lastElementChild.remove();
  refresh();
}

function newTransfer() {
  lastKey = newKey();
  $("again").disabled = $("changed").disabled = false;
}

$("send").onclick = () => { newTransfer(); post("/v1/transfers", lastKey, transfer(1250)); };
$("again").onclick = () => post("/v1/transfers", lastKey, transfer(1250));
$("changed").onclick = () => post("/v1/transfers", lastKey, transfer(9900));
$("twice").onclick = () => {
  newTransfer();
  post("/v1/transfers", lastKey, transfer(1250));
  post("/v1/transfers", lastKey, transfer(1250));
};
$("unprotected").onclick = async () => {
  const key = newKey();
  await post("/v1/unprotected/transfers", key, transfer(1250));
  await post("/v1/unprotected/transfers", key, transfer(1250));
};

$("curl-transfer").textContent =
  `curl -i ${base}/v1/transfers -H 'Content-Type: application/json' -H 'Idempotency-Key: ${newKey()}' -d '${transfer(1250)}'`;

for (const button of document.querySelectorAll(".copy")) {
  button.onclick = async () => {
    const source = $(button.dataset.of);
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

const sums = new Set(["balance_total", "opening_total", "entries_total"]);
let refreshing = false;

async function refresh() {
  if (refreshing) return;
  refreshing = true;
  try {
    const [audit, alice, bob] = await Promise.all(
      ["/v1/audit", "/v1/accounts/alice", "/v1/accounts/bob"].map(async (path) => {
        const response = await fetch(path);
        if (!response.ok) throw new Error(path + ": " + response.status);
        return response.json();
      }));
    $("alice").textContent = money(alice.balance);
    $("bob").textContent = money(bob.balance);
    $("verdict").textContent = audit.ok ? "balanced" : "BROKEN";
    $("verdict").className = "badge " + (audit.ok ? "good" : "bad");
    $("audit").replaceChildren(...Object.entries(audit).filter(([name]) => name !== "ok").map(([name, value]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const count = document.createElement("dd");
      term.textContent = name.replaceAll("_", " ");
      count.textContent = sums.has(name) ? money(value) : Number(value).toLocaleString("en");
      row.append(term, count);
      return row;
    }));
  } catch {
    $("verdict").textContent = "no answer";
    $("verdict").className = "badge warn";
  } finally {
    refreshing = false;
  }
}

refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 1000);
