// The report's page: the samples that stand in it, step by step, of one run or of two side by side.
import { shades, spans, standing } from "../canvas/canvas.js";

const $ = (selector) => document.querySelector(selector);
const { runs, classes, differences, columns } = JSON.parse($("#data").textContent);
const HUES = [265, 215, 0, 120, 170, 60, 320, 30]; // of the classes
const shown = { sample: 0, step: Infinity };
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
  return by === "kind" ? (cell) => `hsl(${HUES[sample.kinds[cell.position]]} 70% 55%)` : shades[by];
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
    const share = byte / most;
    image.data.set(byte === 255 ? [0, 0, 0, 0] : [255 * Math.min(1, 1.6 * share), 90 + 110 * share, 160 * (1 - share), 255], 4 * at);
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
  const mark = sample.passed === null ? "" : sample.passed ? "right, " : "wrong, ";
  return `${mark}${sample.length} tokens in ${sample.passes} passes, local AR-ness@1 ${sample.local ?? "–"}, global ${sample.global ?? "–"}`;
}

function panel(run) {
  const box = document.createElement("div");
  const sample = run.samples[shown.sample];
  box.append(said("h3", run.label));
  if (!sample) return box.append(said("p", "this run has no such sample")), box;
  const row = rowOf(sample);
  const canvas = said("pre", "", "canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("aria-label", `sample of ${run.label}`);
  canvas.append(...spans(row, Math.min(shown.step, row.steps.length), shadeOf(sample)));
  box.append(canvas, said("p", figuresOf(sample) + (sample.revoked.length ? `, ${sample.revoked.length} taken back` : ""), "figures"));
  const map = sample.map ?? run.map;
  if (map) {
    const [picture, nats] = heat(map, row.steps.length);
    const whose = sample.map ? "Entropy" : "Mean entropy of the run's samples";
    box.append(picture, said("p", `${whose}: steps downwards, positions to the right; bright is unsure, at most ${nats.toFixed(1)} nats; what is decided is blank.`, "figures"));
  }
  return box;
}

function show() {
  const some = chosen();
  const samples = some.map((run) => run.samples[shown.sample]).filter(Boolean);
  const last = Math.max(1, ...samples.map((sample) => rowOf(sample).steps.length));
  shown.step = Math.max(0, Math.min(shown.step, last));
  $("#step").max = last;
  $("#step").value = shown.step;
  $("#at").textContent = `${shown.step} of ${last}`;
  $("#prompt").textContent = samples[0]?.prompt ?? "";
  $("#panels").replaceChildren(...some.map(panel));
}

function pick(at) {
  const items = $("#samples").children;
  shown.sample = Math.max(0, Math.min(at, items.length - 1));
  for (const [number, item] of [...items].entries()) item.setAttribute("aria-selected", number === shown.sample);
  $("#samples").setAttribute("aria-activedescendant", `sample-${shown.sample}`);
  const [list, item] = [$("#samples"), items[shown.sample]];
  if (item && (item.offsetTop < list.scrollTop + list.offsetTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.offsetTop + list.clientHeight))
    list.scrollTop = item.offsetTop - list.offsetTop - list.clientHeight / 2;
  shown.step = Infinity;
  show();
}

function list() {
  const run = runs[$("#a").value];
  const items = run.samples.map((sample, at) => {
    const item = said("li", `${sample.passed === null ? "" : sample.passed ? "✓ " : "✗ "}${sample.name}`);
    item.setAttribute("role", "option");
    item.id = `sample-${at}`;
    item.append(strip(sample));
    item.addEventListener("click", () => pick(at));
    return item;
  });
  $("#samples").replaceChildren(...items);
  pick(shown.sample);
}

function legend() {
  const by = $("#colour").value;
  if (by !== "kind") {
    const [first, last] = by === "order" ? ["first step", "last step"] : ["sure", "unsure"];
    const bar = said("span", "", "legend");
    bar.append(first, document.createElement("i"), last);
    return $("#legend").replaceChildren(bar);
  }
  $("#legend").replaceChildren(
    ...classes.flatMap((name, at) => {
      const key = said("span", "", "key");
      key.style.setProperty("--colour", `hsl(${HUES[at]} 70% 55%)`);
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
  const head = document.createElement("tr");
  const body = document.createElement("tr");
  head.append(said("th", `${b} less ${a}, over ${found.prompts} prompts`));
  body.append(said("th", "paired, 95 %"));
  for (const name of columns) {
    const row = found.figures[name];
    if (!row || row.mean === null) continue;
    const [low, high] = [sign * row.low, sign * row.high].sort((x, y) => x - y);
    head.append(said("th", name.replace("ar_ness", "AR-ness").replaceAll("_", " ")));
    const cell = said("td", (sign * row.mean).toFixed(3));
    cell.append(said("small", `${low.toFixed(3)} to ${high.toFixed(3)}, n=${row.prompts}`));
    body.append(cell);
  }
  table.replaceChildren(head, body);
}

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
  ArrowUp: () => pick(shown.sample - 1),
  ArrowDown: () => pick(shown.sample + 1),
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
list();
legend();
compare();
document.body.dataset.shown = runs[0].samples.length; // all is drawn
