// Lanes: one row for each key, one dot for each attempt, newest first; and the ledger's end.

import { $, count, dots, element, money, sides } from "./format.js";

const rows = new Map(); // by lane id

export function drawLanes(state) {
  for (const side of sides) {
    const list = document.querySelector(`.lanes[data-side=${side}]`);
    const lanes = [...state.lanes.values()].filter((l) => l.side === side).sort((a, b) => b.id - a.id);
    const wanted = lanes.map((lane) => {
      const row = rows.get(lane.id);
      const key = `${state.epoch} ${lane.dots} ${lane.ran} ${lane.more}`;
      if (row?.key === key) return row.node;
      const node = draw(lane);
      row?.node.replaceWith(node);
      rows.set(lane.id, { key, node });
      return node;
    });
    if (wanted.length !== list.childElementCount || wanted.some((node, i) => list.children[i] !== node)) list.replaceChildren(...wanted);
  }
  for (const id of rows.keys()) if (!state.lanes.has(id)) rows.delete(id);
}

function draw(lane) {
  const twice = lane.side === "unprotected" && lane.ran > 1;
  const names = [...lane.dots].map((letter) => dots[letter].name).join(", ");
  const paid = twice ? `; paid ${count(lane.ran)} times` : "";
  const row = element("li", { class: twice ? "twice" : "", "aria-label": `${lane.label}: ${names}${paid}` });
  row.append(element("span", { class: "label", "aria-hidden": "true" }, lane.label));
  if (twice) row.append(element("b", { "aria-hidden": "true" }, `${count(lane.ran)}×`));
  if (lane.more) row.append(element("span", { class: "more", "aria-hidden": "true" }, `+${count(lane.more)}`));
  for (const letter of lane.dots) {
    row.append(element("i", { class: "dot", "data-dot": letter, "aria-hidden": "true", title: dots[letter].name }, letter.toUpperCase()));
  }
  return row;
}

let drawn = "";

export function drawLedger(state) {
  const ledger = state.proof?.ledger || [];
  const key = JSON.stringify(ledger);
  if (key === drawn) return;
  drawn = key;
  $("ledger").replaceChildren(...ledger.map((line) => {
    const account = line.account.replace(/^twin-[0-9a-f-]+?-(?=protected|unprotected)/, "");
    const row = element("tr", { class: line.double ? "wrong" : "" });
    row.append(element("td", {}, String(line.id)), element("td", { title: line.account }, account),
      element("td", {}, line.double ? `${line.reference}, again` : line.reference),
      element("td", { class: "number" }, (line.amount > 0 ? "+" : "−") + money(Math.abs(line.amount))));
    return row;
  }));
}
