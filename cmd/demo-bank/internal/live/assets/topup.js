// A top-up with a lost reply of the processor, with and without effects.

import { $, element, money, plural, setText, sides } from "./format.js";

export function prepareTopUp() {
  $("topup").addEventListener("submit", async (event) => {
    event.preventDefault();
    let problem = "";
    try {
      const response = await fetch("/live/topup", { method: "POST", headers: { Accept: "application/json" } });
      if (!response.ok) problem = (await response.json()).detail;
    } catch {
      problem = "The bank does not answer.";
    }
    $("topup-error").hidden = problem === "";
    setText($("topup-error"), problem);
  });
}

const states = { running: "The top-up is under way.", ended: "The top-up is over.", failed: "The top-up did not end in time." };

export function drawTopUp(state) {
  const shown = state.topup;
  if (!shown) return;
  $("topup").querySelector("button").disabled = shown.state === "running";
  setText($("topup-line"), `${states[shown.state]} ${money(shown.amount)} from a card.`);
  sides.forEach((side, index) => {
    const { steps, charges, postings } = shown.sides[index];
    const node = document.querySelector(`.topup[data-side=${side}]`);
    node.dataset.state = charges > postings && shown.state !== "running" ? "broken" : "ok";
    setText(node.querySelector("[data-of=sums]"), steps.length ? `${plural(charges, "charge", "charges")} at the processor, ${plural(postings, "posting", "postings")} in the books` : "\u2013");
    const list = node.querySelector("ol");
    while (list.children.length > steps.length) list.lastChild.remove();
    steps.forEach((step, i) => (list.children[i] ? setText(list.children[i], step) : list.append(element("li", {}, step))));
  });
}
