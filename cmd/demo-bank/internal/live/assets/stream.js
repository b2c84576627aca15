// The stream of events, and their sum. A snapshot replaces everything. A field of an update replaces
// that field.

const silentMaxMS = 6000; // the proof sends two events a second
const againMS = 1500;

export function emptyState() {
  return { epoch: "", storm: null, counts: null, bars: new Map(), lanes: new Map(), proof: null, topup: null, statements: null, limits: { lanes_max: 48, bars_max: 45 } };
}

// fold applies a frame and returns the state: a new one for a snapshot, so that nothing of another process remains.
export function fold(state, frame, snapshot) {
  if (snapshot) {
    state = emptyState();
    state.epoch = frame.epoch;
    state.limits = frame.limits;
  }
  if (frame.reset) state.lanes.clear();
  for (const field of ["storm", "counts", "proof", "topup", "statements"]) {
    if (frame[field]) state[field] = frame[field];
  }
  state.now = frame.at_ms;
  for (const bar of frame.bars || []) state.bars.set(bar.t, bar);
  trim(state.bars, state.limits.bars_max);
  for (const lane of frame.lanes || []) state.lanes.set(lane.id, lane);
  for (const side of ["protected", "unprotected"]) {
    const ids = [...state.lanes.values()].filter((l) => l.side === side).map((l) => l.id).sort((a, b) => a - b);
    for (const id of ids.slice(0, Math.max(0, ids.length - state.limits.lanes_max))) state.lanes.delete(id);
  }
  return state;
}

function trim(map, max) {
  const keys = [...map.keys()].sort((a, b) => a - b);
  for (const key of keys.slice(0, Math.max(0, keys.length - max))) map.delete(key);
}

// watch opens the stream and keeps it open. It calls onFrame(frame, isSnapshot) for each event, and onState with "live",
// "connecting" or "gone" when that changes.
export function watch(onFrame, onState) {
  let source = null;
  let heard = 0;
  let again = 0;

  function open() {
    clearTimeout(again);
    source?.close();
    heard = performance.now();
    source = new EventSource("/live/events");
    for (const kind of ["snapshot", "update"]) {
      source.addEventListener(kind, (event) => {
        heard = performance.now();
        onState("live");
        onFrame(JSON.parse(event.data), kind === "snapshot");
      });
    }
    source.onerror = () => {
      onState(source.readyState === EventSource.CLOSED ? "gone" : "connecting");
      // A refusal such as 503 ends an EventSource for good.
      if (source.readyState === EventSource.CLOSED) again = setTimeout(open, againMS);
    };
  }

  open();
  setInterval(() => {
    if (performance.now() - heard < silentMaxMS || document.hidden) return;
    onState("connecting");
    open();
  }, 1000);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) heard = performance.now(); });
}
