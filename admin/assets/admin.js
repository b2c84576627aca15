// What the pages do beyond plain HTML: figures refresh by themselves, and a key can be copied. Without this script a reload
// shows the same.
"use strict";

const everyMS = 5000;
const saidEveryMS = 30000; // to a screen reader: not each change

for (const section of document.querySelectorAll("[data-live]")) {
  const figure = (name) => section.querySelector(`[data-figure="${name}"]`);
  const said = section.querySelector("[data-said]");
  let timer = 0, saidAt = Date.now(), saidText = "", paused = false, asking = null;

  const show = (figures) => {
    for (const name of ["live", "running", "expired", "size", "at"]) {
      const cell = figure(name);
      if (cell.textContent !== figures[name]) cell.textContent = figures[name];
    }
    figure("state").textContent = "As of";
    section.classList.remove("stale");
    const text = `${figures.live} live records, ${figures.running} keys held, ${figures.expired} expired`;
    if (text !== saidText && Date.now() - saidAt >= saidEveryMS) {
      said.textContent = saidText = text;
      saidAt = Date.now();
    }
  };
  const refresh = async () => {
    asking = new AbortController();
    const cutOff = setTimeout(() => asking.abort(), 2 * everyMS);
    try {
      const answer = await fetch(section.dataset.live, { headers: { Accept: "application/json" }, signal: asking.signal });
      if (!answer.ok) throw new Error(answer.statusText);
      show(await answer.json());
    } catch {
      figure("state").textContent = "Not refreshed since";
      section.classList.add("stale");
    }
    clearTimeout(cutOff);
    plan();
  };
  const plan = () => {
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(refresh, everyMS);
  };

  const button = document.createElement("button");
  button.type = "button";
  button.className = "small";
  button.textContent = "Pause";
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
    if (paused) clearTimeout(timer);
    else refresh();
  });
  section.querySelector(".refreshed").append(" ", button);
  document.addEventListener("visibilitychange", plan);
  plan();
}

for (const name of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "small";
  button.textContent = "Copy";
  button.setAttribute("aria-live", "polite");
  const text = name.textContent;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not copied";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  name.after(button);
}
