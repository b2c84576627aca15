// Projections with and without an inbox, and the dead letters.

import { $, count, element, setText, sides } from "./format.js";

// post sends an act, and shows why it was refused.
async function post(fields) {
  let problem = "";
  try {
    const response = await fetch("/live/statements", { method: "POST", headers: { Accept: "application/json" }, body: new URLSearchParams(fields) });
    if (!response.ok) problem = (await response.json()).detail;
  } catch {
    problem = "The bank does not answer.";
  }
  $("statements-error").hidden = problem === "";
  setText($("statements-error"), problem);
}

export function prepareStatements() {
  $("acts").addEventListener("submit", (event) => {
    event.preventDefault();
    post({ act: event.submitter.value });
  });
  $("dead").addEventListener("click", (event) => {
    if (event.target.dataset.id) post({ act: "redrive", id: event.target.dataset.id });
  });
}

const counts = ["missing", "doubled", "mismatches"];

export function drawStatements(state) {
  const shown = state.statements;
  const running = shown?.state === "running";
  for (const button of $("statements").querySelectorAll("button")) button.disabled = running;
  if (!shown) {
    setText($("statements-line"), "No consumer has been broken yet.");
    drawDead([], running);
  } else {
    setText($("statements-line"), `${shown.line} ${count(shown.payments)} payments so far.`);
    drawDead(shown.dead, running);
  }
  for (const row of $("statements").querySelectorAll("tr[data-count]")) {
    sides.forEach((side, index) => {
      const cell = row.querySelector(`[data-side=${side}]`);
      const wrong = shown?.sides[index][row.dataset.count];
      // While messages are under way a count proves nothing yet.
      cell.className = !shown || running ? "" : wrong ? "wrong" : "ok";
      setText(cell, !shown ? "\u2013" : running ? count(wrong) : `${wrong ? "\u2717" : "\u2713"} ${count(wrong)}`);
    });
  }
  let [name, words] = ["pending", "waiting"];
  if (running) words = "under way";
  else if (shown?.state === "failed") words = "no result";
  else if (shown) [name, words] = counts.every((c) => !shown.sides[0][c]) ? ["ok", "each once with the inbox"] : ["broken", "BROKEN"];
  $("statements").dataset.state = name;
  setText($("statements-verdict"), words);
}

function drawDead(dead, running) {
  $("dead-none").hidden = dead.length > 0;
  const list = $("dead");
  const ids = new Set(dead.map((d) => d.id));
  for (const item of [...list.children]) if (!ids.has(item.dataset.id)) item.remove();
  const known = new Set([...list.children].map((item) => item.dataset.id));
  for (const { id, account, error } of dead) {
    if (known.has(id)) continue;
    const redrive = element("button", { type: "button", "data-id": id }, "Redrive");
    redrive.disabled = running;
    list.append(element("li", { "data-id": id }, redrive, element("span", {}, `${account}: ${error}`), element("code", {}, id)));
  }
}
