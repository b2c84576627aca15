// The storm's form, its progress, and its summary for screen readers.

import { $, count, money, plural, setText } from "./format.js";

const presets = {
  replies: { keys: 300, copies: 1, clients: 4, share: 30, mode: "both", faults: ["reply-lost"] },
  everything: { keys: 300, copies: 2, clients: 8, share: 40, mode: "both", faults: ["reply-lost", "request-lost", "duplicate", "slow", "killed", "serialization"] },
};
const form = $("storm");

export function prepareStorm() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send("/live/storm", new URLSearchParams(new FormData(form)));
  });
  for (const button of form.querySelectorAll("[data-preset]")) {
    button.addEventListener("click", () => {
      const preset = presets[button.dataset.preset];
      for (const name of ["keys", "copies", "clients", "share", "mode"]) form.elements[name].value = preset[name];
      for (const box of form.querySelectorAll("[name=fault]")) box.checked = preset.faults.includes(box.value);
      form.requestSubmit();
    });
  }
  $("stop").addEventListener("click", () => send("/live/storm/stop", new URLSearchParams()));
}

async function send(path, body) {
  let problem = "";
  try {
    const response = await fetch(path, { method: "POST", headers: { Accept: "application/json" }, body });
    if (!response.ok) {
      const text = await response.text();
      try { problem = JSON.parse(text).detail; } catch { problem = text.trim(); }
    }
  } catch {
    problem = "The bank does not answer.";
  }
  $("storm-error").hidden = problem === "";
  setText($("storm-error"), problem);
}

const states = { running: "Storm in flight", ended: "The storm is over", stopped: "The storm was stopped", "timed-out": "The storm took its whole minute", failed: "The storm failed" };

export function drawStorm(state) {
  const storm = state.storm;
  const running = storm?.state === "running";
  for (const button of form.querySelectorAll("[data-preset], [type=submit]")) button.disabled = running;
  $("stop").disabled = !running;
  $("progress").value = storm ? storm.answered / storm.copies : 0;
  if (!storm) {
    setText($("storm-line"), state.proof?.run ? "The last storm, read from the books. The bank has been restarted since." : "No storm has run yet.");
    return;
  }
  const attempts = state.counts ? state.counts[0].attempts + state.counts[1].attempts : 0;
  const lost = state.counts ? state.counts[0].lost_replies + state.counts[1].lost_replies : 0;
  const seconds = ((storm.ended_ms || state.now) - storm.started_ms) / 1000;
  setText($("storm-line"), `${states[storm.state]}: ${count(storm.plan.keys)} payments of ${money(storm.amount)} per side, ` +
    `${plural(attempts, "attempt", "attempts")}, ${plural(lost, "reply", "replies")} lost, ${Math.max(0, seconds).toFixed(1)} s.`);
}

// Screen readers read the summary aloud: when a storm ends, and every few seconds while one runs.
const spokenEveryMS = 5000;
let spokenAt = 0;
let spoken = "";

export function speak(state) {
  const storm = state.storm;
  const twins = state.proof?.twins || [];
  if (!storm || !twins.length) return;
  const running = storm.state === "running";
  if (state.proof.in_flight && !running) return; // wait for the proof from after the end
  const key = `${storm.run} ${storm.state}`;
  if (running ? performance.now() - spokenAt < spokenEveryMS : spoken === key) return;
  spokenAt = performance.now();
  spoken = key;
  const words = twins.map((t) => `${t.side === "protected" ? "With the middleware" : "Without protection"} ${money(t.lost_money)} lost to ${plural(t.doubles, "double", "doubles")}`);
  setText($("summary"), `${states[storm.state]}. ${words.join(". ")}.`);
}
