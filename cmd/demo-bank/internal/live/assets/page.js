// The page: it folds the stream's frames into one state, and draws that once per animation frame.

import { drawBars, prepareBars } from "./bars.js";
import { $, setText } from "./format.js";
import { prepareHand } from "./hand.js";
import { drawLanes, drawLedger } from "./lanes.js";
import { drawStatements, prepareStatements } from "./statements.js";
import { drawStorm, prepareStorm, speak } from "./storm.js";
import { emptyState, fold, watch } from "./stream.js";
import { drawTopUp, prepareTopUp } from "./topup.js";
import { drawProof, drawTwins } from "./twins.js";

let state = emptyState();
let asked = false;

function draw() {
  asked = false;
  for (const part of [drawStorm, drawTwins, drawProof, drawBars, drawLanes, drawLedger, drawTopUp, drawStatements, speak]) part(state);
  document.body.dataset.epoch = state.epoch;
}

function frame(data, snapshot) {
  state = fold(state, data, snapshot);
  if (!asked) {
    asked = true;
    requestAnimationFrame(draw);
  }
}

const words = { live: "live", connecting: "connecting", gone: "no stream, trying again" };

function connection(name) {
  $("connection").dataset.state = name;
  setText($("connection"), words[name]);
}

prepareBars();
prepareStorm();
prepareHand();
prepareTopUp();
prepareStatements();
watch(frame, connection);
