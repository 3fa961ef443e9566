// The report's page: its samples step by step, of one run or of two side by side.
import { ramp, shades, spans, standing } from "../canvas/canvas.js";

const $ = (selector) => document.querySelector(selector);
const { runs, classes, differences, columns } = JSON.parse($("#data").textContent);
const KINDS = ["#0072b2", "#56b4e9", "#d55e00", "#009e73", "#8a8f98", "#e69f00", "#cc79a7", "#b8a800"]; // colours that colour-blind readers can tell apart
const shown = { item: 0, step: Infinity }; // an item of the list, after so many steps
let items = []; // of the list: the numbers of the samples that each is
let playing = 0;

// --- a sample as a row of a canvas ---

function rowOf(sample) {
  if (sample.row) return sample.row;
  const count = Math.max(0, ...sample.steps.map((step) => step + 1), ...sample.revoked.map((each) => each[3] + 1));
  const steps = Array.from({ length: count }, () => ({ committed: [], revoked: [] }));
  const decided = new Set(sample.revoked.map((each) => each[0]));
  // what was filled in behind the end without being decided is nothing to see
  const canvas = sample.pieces.map((text, at) => (sample.steps[at] >= 0 || decided.has(at) ? null : at < sample.length ? text : ""));
  sample.steps.forEach((step, position) => {
    if (step >= 0) steps[step].committed.push({ position, text: sample.pieces[position], log_prob: Math.log(sample.sure[position] / 100) });
  });
  for (const [position, text, made, revoked] of sample.revoked) {
    steps[made].committed.push({ position, text, log_prob: 0 });
    steps[revoked].revoked.push(position);
  }
  return (sample.row = { canvas, steps });
}

const shadeOf = (sample) => {
  const by = $("#colour").value;
  return by === "kind" ? (cell) => KINDS[sample.kinds[cell.position]] : shades[by];
};

function strip(sample) {
  const canvas = document.createElement("canvas");
  canvas.width = sample.pieces.length;
  canvas.height = 1;
  const pen = canvas.getContext("2d");
  const row = rowOf(sample);
  const shade = shadeOf(sample);
  standing(row, row.steps.length).forEach((cell, at) => {
    if (!cell || cell.known || at >= sample.length) return;
    pen.fillStyle = shade(cell, row);
    pen.fillRect(at, 0, 1, 1);
  });
  return canvas;
}

function heat(map, count) {
  const canvas = document.createElement("canvas");
  canvas.width = map.columns;
  canvas.height = map.rows;
  const bytes = Uint8Array.from(atob(map.bytes), (character) => character.charCodeAt(0));
  const most = Math.max(1, ...bytes.filter((byte) => byte < 255));
  const image = new ImageData(map.columns, map.rows);
  bytes.forEach((byte, at) => {
    image.data.set(byte === 255 ? [0, 0, 0, 0] : [...ramp(byte / most), 255], 4 * at);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  const box = document.createElement("div");
  box.className = "heat";
  const line = document.createElement("i");
  line.style.top = `${(100 * Math.min(shown.step, count)) / Math.max(count, 1)}%`;
  box.append(canvas, line);
  return [box, most / 40];
}

// --- what is shown ---

const chosen = () => [$("#a"), $("#b")].map((select) => runs[select.value]).filter(Boolean);

function said(tag, text, name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

function figuresOf(sample) {
  const verdict = sample.passed === null ? "" : sample.passed ? "Passed, " : "Failed, ";
  return `${verdict}${sample.length} tokens in ${sample.passes} passes; local AR-ness@1 ${sample.local?.toFixed(3) ?? "–"}, global ${sample.global?.toFixed(3) ?? "–"}`;
}

function panel(run) {
  const box = document.createElement("div");
  const sample = run.samples[items[shown.item]?.[0]];
  box.append(said("h3", run.label));
  if (!sample) {
    box.append(said("p", "This run has no such answer."));
    return box;
  }
  const row = rowOf(sample);
  const canvas = said("pre", "", "canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("aria-label", `answer of ${run.label}`);
  canvas.append(...spans(row, Math.min(shown.step, row.steps.length), shadeOf(sample)));
  box.append(canvas, said("p", figuresOf(sample) + (sample.revoked.length ? `, ${sample.revoked.length} taken back` : ""), "figures"));
  const map = sample.map ?? run.map;
  if (map) {
    const [picture, nats] = heat(map, row.steps.length);
    const whose = sample.map ? "Entropy of each open position" : "Mean entropy of each open position, over the run's answers";
    box.append(picture, ramped("0", `${nats.toFixed(1)} nats`), said("p", `${whose}, before each step (downwards). Committed positions are blank.`, "figures"));
  }
  return box;
}

function show() {
  const some = chosen();
  const samples = some.map((run) => run.samples[items[shown.item]?.[0]]).filter(Boolean);
  const last = Math.max(1, ...samples.map((sample) => rowOf(sample).steps.length));
  shown.step = Math.max(0, Math.min(shown.step, last));
  $("#step").max = last;
  $("#step").value = shown.step;
  $("#at").textContent = `${shown.step} of ${last}`;
  $("#prompt").textContent = samples[0]?.prompt ?? "";
  $("#panels").replaceChildren(...some.map(panel));
}

function pick(at) {
  const list = $("#samples");
  shown.item = Math.max(0, Math.min(at, items.length - 1));
  for (const [number, item] of [...list.children].entries()) item.setAttribute("aria-selected", number === shown.item);
  list.setAttribute("aria-activedescendant", `sample-${shown.item}`);
  const item = list.children[shown.item];
  if (item && (item.offsetTop < list.scrollTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight))
    list.scrollTop = item.offsetTop - list.clientHeight / 2;
  shown.step = Infinity;
  show();
}

// failures first; answers to one prompt with the same text are one item, if wanted
function itemsOf(run) {
  const found = new Map();
  run.samples.forEach((sample, at) => {
    const key = $("#fold").checked ? JSON.stringify([sample.prompt, sample.passed, sample.pieces.slice(0, sample.length)]) : at;
    found.set(key, [...(found.get(key) ?? []), at]);
  });
  const failed = ([at]) => run.samples[at].passed === false;
  return [...found.values()].sort((one, other) => failed(other) - failed(one));
}

function list() {
  const run = runs[$("#a").value];
  items = itemsOf(run);
  const entries = items.map((numbers, at) => {
    const sample = run.samples[numbers[0]];
    const item = said("li", `${sample.passed === null ? "" : sample.passed ? "✓ " : "✗ "}${sample.name}`, sample.passed === false ? "failed" : "");
    item.setAttribute("role", "option");
    item.id = `sample-${at}`;
    if (numbers.length > 1) item.append(said("b", `×${numbers.length}`));
    item.append(strip(sample));
    item.addEventListener("click", () => pick(at));
    return item;
  });
  $("#samples").replaceChildren(...entries);
  pick(shown.item);
}

function ramped(first, last) {
  const bar = said("span", "", "legend figures");
  bar.append(first, document.createElement("i"), last);
  return bar;
}

function legend() {
  const by = $("#colour").value;
  if (by === "order") return $("#legend").replaceChildren(ramped("first step", "last step"));
  if (by === "sure") return $("#legend").replaceChildren(ramped("sure", "unsure"));
  $("#legend").replaceChildren(
    ...classes.flatMap((name, at) => {
      const key = said("span", "", "key");
      key.style.setProperty("--colour", KINDS[at]);
      return [key, name];
    }),
  );
}

function compare() {
  const [a, b] = chosen().map((run) => run.label);
  const found = b && differences.find((each) => (each.a === a && each.b === b) || (each.a === b && each.b === a));
  const table = $("#differences");
  table.hidden = !found || a === b;
  if (table.hidden) return;
  const sign = found.a === a ? 1 : -1;
  const head = document.createElement("thead");
  const body = document.createElement("tr");
  head.append(said("th", "Difference"));
  body.append(said("th", `${b} less ${a}, over ${found.prompts} prompts`));
  for (const name of columns) {
    const row = found.figures[name];
    if (!row || row.mean === null) continue;
    const [low, high] = [sign * row.low, sign * row.high].sort((x, y) => x - y);
    const cell = said("td", signed(sign * row.mean));
    cell.dataset.name = name.replace("ar_ness", "AR-ness").replace("distinct", "different programs").replaceAll("_", " ");
    head.append(said("th", cell.dataset.name));
    cell.append(said("small", `${signed(low)} to ${signed(high)}${row.prompts === found.prompts ? "" : `, ${row.prompts} prompts`}`));
    body.append(cell);
  }
  table.replaceChildren(head, body);
}

const signed = (value) => `${value > 0 ? "+" : ""}${value.toFixed(3)}`;

// --- choices and keys ---

function play() {
  clearInterval(playing);
  $("#play").textContent = playing ? "Play" : "Stop";
  if (playing) return (playing = 0);
  if (shown.step >= Number($("#step").max)) shown.step = 0;
  playing = setInterval(() => {
    shown.step += 1;
    show();
    if (shown.step >= Number($("#step").max)) play();
  }, 60);
}

const keys = {
  ArrowUp: () => pick(shown.item - 1),
  ArrowDown: () => pick(shown.item + 1),
  ArrowLeft: () => (shown.step -= 1),
  ArrowRight: () => (shown.step += 1),
  Home: () => (shown.step = 0),
  End: () => (shown.step = Infinity),
  " ": play,
};
$("#viewer").addEventListener("keydown", (event) => {
  if (!keys[event.key] || event.target.matches("select, button") || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  keys[event.key]();
  show();
});
$("#step").addEventListener("input", () => {
  shown.step = Number($("#step").value);
  show();
});
$("#play").addEventListener("click", play);
for (const select of [$("#a"), $("#b")]) {
  if (select.id === "b") select.append(new Option("nothing", ""));
  runs.forEach((run, at) => select.append(new Option(run.label, at)));
  select.addEventListener("change", () => (list(), compare()));
}
$("#b").value = runs.length > 1 ? 1 : "";
$("#colour").addEventListener("change", () => (list(), legend()));
$("#fold").addEventListener("change", list);
list();
legend();
compare();
document.body.dataset.shown = runs[0].samples.length; // all is drawn
