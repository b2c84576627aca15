// The money of the two twins, and the proof.

import { $, count, euros, money, plural, setText, sides } from "./format.js";

export function drawTwins(state) {
  const twins = state.proof?.twins || [];
  const most = Math.max(1, ...twins.map((t) => t.payee_balance));
  for (const side of sides) {
    const card = document.querySelector(`.twin[data-side=${side}]`);
    const twin = twins.find((t) => t.side === side);
    const part = (name) => card.querySelector(`[data-of=${name}]`);
    const running = state.storm?.state === "running";
    if (!twin || twin.transfers === 0) {
      card.dataset.state = "idle";
      for (const name of ["lost", "ordered", "paid", "payer"]) setText(part(name), "–");
      setText(part("verdict"), side === "protected" ? "A retry gets the first answer." : "Each retry is a new payment.");
      part("due").style.width = part("over").style.width = "0";
      continue;
    }
    const due = twin.payee_balance - twin.lost_money;
    card.dataset.state = twin.doubles > 0 ? "lost" : "exact";
    setText(part("lost"), twin.lost_money > 0 ? "−" + money(twin.lost_money) : money(0));
    setText(part("verdict"), verdict(twin, running, state.counts?.[sides.indexOf(side)]));
    setText(part("ordered"), `${plural(twin.payments, "payment", "payments")}, ${money(due)}`);
    setText(part("paid"), `${plural(twin.transfers, "transfer", "transfers")}, ${money(twin.payee_balance)}`);
    setText(part("payer"), money(twin.payer_balance));
    part("due").style.width = (100 * due) / most + "%";
    part("over").style.width = (100 * twin.lost_money) / most + "%";
  }
}

function verdict(twin, running, counts) {
  if (twin.doubles > 0) return `${plural(twin.doubles, "payment was", "payments were")} made again${running ? ", so far" : ""}.`;
  const replays = counts?.replayed || 0;
  const kept = replays > 0 ? ` ${plural(replays, "retry", "retries")} got the recorded answer.` : "";
  return `Each paid once${running ? ", so far" : ""}.${kept}`;
}

export function drawProof(state) {
  const proof = state.proof;
  if (!proof) return;
  const twins = proof.twins || [];
  for (const row of document.querySelectorAll("#proof tr[data-check]")) {
    for (const cell of row.querySelectorAll("td")) {
      const twin = twins.find((t) => t.side === cell.dataset.side);
      const check = twin?.checks.find((c) => c.name === row.dataset.check);
      cell.className = check ? (check.ok ? "ok" : "wrong") : "";
      const value = (n) => (check.money ? euros(n) : count(n));
      setText(cell, check ? `${check.ok ? "✓" : "✗"} ${value(check.got)} ${check.ok ? "=" : "≠"} ${value(check.want)}` : "–");
    }
  }
  const kept = twins.find((t) => t.side === "protected");
  const storm = state.storm?.run === proof.run ? state.storm : null;
  const holds = kept?.checks.every((c) => c.ok) && !storm?.differing;
  let name = "pending";
  let words = state.storm?.state === "running" ? "storm in flight" : "no storm yet";
  if (proof.error) [name, words] = ["stale", proof.error];
  else if (kept && !holds) [name, words] = ["broken", "BROKEN"];
  else if (kept) [name, words] = ["ok", proof.in_flight ? "holds, storm in flight" : "holds"];
  else if (twins.length) [name, words] = ["pending", "nothing protected to prove"];
  $("proof").dataset.state = name;
  setText($("proof-verdict"), words);
  const asked = storm?.answered ? ` Clients compared ${plural(storm.answered, "answer", "answers")}: ${count(storm.differing)} differed from the first answer to their key.` : "";
  setText($("proof-line"), `One REPEATABLE READ snapshot, read in ${proof.took_ms.toFixed(1)} ms at ${new Date(proof.at_ms).toLocaleTimeString("en-GB")}.${asked}`);
  const audits = { ok: "The audit of the whole bank after it: ok.", broken: "THE AUDIT OF THE WHOLE BANK IS BROKEN.", unknown: "" };
  setText($("bank-audit"), audits[storm?.audit] || "");
  setText($("alice"), money(proof.alice));
  setText($("bob"), money(proof.bob));
}
