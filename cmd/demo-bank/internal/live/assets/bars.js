// Bars: one for each second and side, stacked by outcome.

import { count, dots, element, plural, sides } from "./format.js";

const height = 120;
const slot = 10;
const kinds = ["e", "r", "p", "m", "f", "l"]; // without lost requests: they never reached the bank
const pools = new Map();

export function prepareBars() {
  document.getElementById("legend").replaceChildren(...Object.entries(dots).map(([letter, dot]) =>
    element("li", {}, element("i", { class: "dot", "data-dot": letter, "aria-hidden": "true" }, letter.toUpperCase()), dot.name)));
}

export function drawBars(state) {
  const last = Math.floor((state.now || 0) / 1000);
  const first = last - state.limits.bars_max + 1;
  let most = 20;
  for (const bar of state.bars.values()) {
    if (bar.t < first || bar.t > last) continue; // kept, but not shown: a quiet second has no bar
    for (const counts of bar.sides) most = Math.max(most, sum(counts));
  }
  sides.forEach((side, index) => {
    const svg = document.querySelector(`svg.bars[data-side=${side}]`);
    const pool = pools.get(side) || pools.set(side, []).get(side);
    let used = 0;
    let peak = 0;
    for (const bar of state.bars.values()) {
      if (bar.t < first || bar.t > last) continue;
      const counts = bar.sides[index];
      let top = height;
      peak = Math.max(peak, sum(counts));
      for (const kind of kinds) {
        const h = (counts[dots[kind].count] * (height - 4)) / most;
        if (h === 0) continue;
        top -= h;
        const rect = pool[used] || (pool[used] = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "rect")));
        used++;
        set(rect, "class", "k-" + kind);
        set(rect, "x", (bar.t - first) * slot + 1);
        set(rect, "y", top.toFixed(1));
        set(rect, "width", slot - 2);
        set(rect, "height", h.toFixed(1));
      }
    }
    for (const rect of pool.slice(used)) set(rect, "height", 0);
    const counts = state.counts?.[index];
    const label = counts ? Object.values(dots).filter((d) => counts[d.count]).map((d) => plural(counts[d.count], d.name, d.many || d.name)).join(", ") : "";
    set(svg, "aria-label", label ? `${label}. Most in a second: ${count(peak)}.` : "No attempts yet");
    const caption = document.querySelector(`[data-count=${side}]`);
    if (caption.textContent !== label) caption.textContent = label;
  });
}

const sum = (counts) => kinds.reduce((n, kind) => n + counts[dots[kind].count], 0);

function set(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}
