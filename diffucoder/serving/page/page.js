// The page: asks the server that sent it, shows every commitment as it comes, and replays what came.
// A run is { rows: [{ canvas, steps }], row, passes, seconds, answer }; all that is shown is computed from it.

import { isControl, shades, spans, standing } from "../canvas/canvas.js";

const $ = (selector, within = document) => within.querySelector(selector);
const HOLE = /<\|hole(:\d+)?\|>/;
const EXAMPLES = {
  "sum the even numbers": "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers.",
  "reverse a string": "Write a function that reverses the string.",
  "join words": "Write a function that takes a list of words and joins the words with dashes.",
  "fill two holes":
    "# Write a function total(nums) that keeps only the even numbers, then sums the numbers.\n" +
    "def total(nums):\n    nums = [n for n in nums if<|hole:7|>]\n    return<|hole:1|>(nums)\n",
};
let stop = null; // ends what is running

// --- a run, from the server's events ---

async function* events(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if ($("#key").value) headers.authorization = `Bearer ${$("#key").value}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    if (response.status === 401) $("#key-label").hidden = false;
    throw new Error((await response.json()).error.message);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const told = JSON.parse(line.slice(6));
      if (told.error) throw new Error(told.error.message);
      yield told;
    }
  }
}

function asked(text, settings) {
  const decoding = { policy: settings.policy };
  if (settings.steps > 0) decoding.steps = settings.steps;
  if (settings.threshold < 1) decoding.threshold = settings.threshold;
  const common = { temperature: settings.temperature, seed: settings.seed, decoding, stream: true, stream_options: { denoise: true } };
  if (HOLE.test(text)) return ["v1/fill", { ...common, text }];
  if ($("#raw").checked) return ["v1/completions", { ...common, prompt: text, max_tokens: settings.tokens }];
  return ["v1/chat/completions", { ...common, messages: [{ role: "user", content: text }], max_tokens: settings.tokens }];
}

function take(run, told) {
  const made = told.denoise;
  if (made?.canvas) run.rows[made.row] = { canvas: made.canvas, before: run.before, steps: [] };
  else if (made) {
    run.rows[made.row].steps.push(made);
    run.passes = Math.max(run.passes, made.passes);
  }
  for (const choice of told.choices) {
    if (!choice.finish_reason) continue;
    run.answer = choice;
    run.row = choice.row ?? 0;
  }
}

// --- what is shown of it ---

function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

function figures(run) {
  const row = run.rows[run.row];
  const cells = standing(row, row.steps.length);
  const tokens = cells.filter((cell) => cell && !cell.known);
  const end = tokens.findIndex((cell) => isControl(cell.text));
  const count = end < 0 ? tokens.length : end;
  const passes = Math.max(...row.steps.map((step) => step.passes), 1);
  return `${counted(count, "token")} in ${counted(passes, "pass", "passes")}, ${run.seconds.toFixed(1)} s, ${(count / run.seconds).toFixed(0)} tokens/s`;
}

// --- a panel: settings, canvas, replay ---

class Panel {
  constructor(name) {
    this.root = $("#panel").content.cloneNode(true).firstElementChild;
    $("h2", this.root).textContent = name;
    $(".settings", this.root).open = matchMedia("(min-width: 44rem)").matches;
    for (const field of this.root.querySelectorAll(".settings input[type=range]")) {
      const say = () => ($("output", field.parentElement).textContent = this.said(field));
      field.addEventListener("input", say);
      say();
    }
    this.field("step").addEventListener("input", () => this.show(Number(this.field("step").value)));
    this.field("play").addEventListener("click", () => this.play());
    this.field("copy").addEventListener("click", () => this.copy());
    this.field("save").addEventListener("click", () => this.save());
  }

  field(name) {
    return $(`[name=${name}]`, this.root);
  }

  said(field) {
    if (field.name === "steps" && field.value === "0") return "the server's default";
    if (field.name === "threshold" && field.value === "1") return "the server's default";
    return field.name === "threshold" ? `p ≥ ${field.value}` : field.value;
  }

  get settings() {
    const numbers = ["temperature", "tokens", "steps", "threshold", "seed"].map((name) => [name, Number(this.field(name).value)]);
    return { ...Object.fromEntries(numbers), policy: this.field("policy").value };
  }

  async write(text, signal) {
    const began = performance.now();
    // what stands before the first hole is not part of the answer, but a reader wants to see it
    const before = HOLE.test(text) ? text.slice(0, text.search(HOLE)) : "";
    const run = (this.run = { rows: [], row: 0, passes: 0, seconds: 0, answer: null, before });
    this.enable(false);
    $(".canvas", this.root).classList.add("old");
    const [path, body] = asked(text, this.settings);
    for await (const told of events(path, body, signal)) {
      take(run, told);
      if (run.rows[run.row]) this.show(run.rows[run.row].steps.length);
    }
    run.seconds = (performance.now() - began) / 1000;
    this.show(run.rows[run.row].steps.length);
    $(".figures", this.root).textContent = figures(run);
    this.enable(true);
  }

  show(upTo) {
    const row = this.run.rows[this.run.row];
    const canvas = $(".canvas", this.root);
    canvas.classList.remove("old");
    const before = document.createElement("span");
    before.className = "known";
    before.textContent = row.before;
    canvas.replaceChildren(before, ...spans(row, upTo, shades[$("#colour").value]));
    const slider = this.field("step");
    slider.max = row.steps.length;
    slider.value = upTo;
    $(".replay output", this.root).textContent = `${upTo} of ${row.steps.length}`;
  }

  again() {
    if (this.run?.rows[this.run.row]) this.show(Number(this.field("step").value));
  }

  async play() {
    const { steps } = this.run.rows[this.run.row];
    for (let at = 0; at <= steps.length; at++) {
      this.show(at);
      await new Promise((done) => setTimeout(done, Math.min(120, 3000 / steps.length)));
    }
  }

  async copy() {
    const { answer } = this.run;
    await navigator.clipboard.writeText(answer.text ?? $(".canvas", this.root).textContent.trimEnd() + "\n");
    say("Copied.");
  }

  save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${JSON.stringify(this.run.answer.trace)}\n`], { type: "application/jsonl" }));
    link.download = "trace.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  enable(on) {
    for (const name of ["step", "play", "copy", "save"]) this.field(name).disabled = !on;
  }
}

// --- the form ---

const panels = [new Panel("")];
$("#panels").append(panels[0].root);

function say(text, wrong = false) {
  $("#status").textContent = text;
  $("#status").classList.toggle("error", wrong);
}

async function write() {
  if (stop || !$("#text").value.trim()) return;
  stop = new AbortController();
  $("#go").disabled = true;
  $("#halt").disabled = false;
  say("Writing …");
  const ended = await Promise.allSettled(panels.map((panel) => panel.write($("#text").value, stop.signal)));
  const wrong = ended.find((each) => each.status === "rejected");
  if (!wrong) say("Done. Move the step slider to replay it.");
  else say(wrong.reason.name === "AbortError" ? "Stopped." : wrong.reason.message, wrong.reason.name !== "AbortError");
  stop = null;
  $("#go").disabled = false;
  $("#halt").disabled = true;
}

$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
$("#halt").addEventListener("click", () => stop?.abort());
$("#colour").addEventListener("change", () => {
  const [low, high] = $("#colour").value === "order" ? ["first step", "last step"] : ["sure", "unsure"];
  $("#low").textContent = low;
  $("#high").textContent = high;
  panels.forEach((panel) => panel.again());
});
for (const [name, text] of Object.entries(EXAMPLES)) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = name;
  button.addEventListener("click", () => {
    $("#text").value = text;
    write();
  });
  $("#examples").append(button);
}
$("#hole").addEventListener("click", () => {
  const field = $("#text");
  field.setRangeText("<|hole:4|>", field.selectionStart, field.selectionEnd, "end");
  field.focus();
});
$("#compare").addEventListener("change", () => {
  if ($("#compare").checked) {
    panels.push(new Panel("B"));
    panels[1].field("threshold").value = 0.9;
    panels[1].field("threshold").dispatchEvent(new Event("input"));
    $("#panels").append(panels[1].root);
  } else panels.pop().root.remove();
  $("h2", panels[0].root).textContent = $("#compare").checked ? "A" : "";
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
  if (event.key === "Escape") stop?.abort();
});

fetch("ready")
  .then((response) => response.json())
  .then((state) => ($("#model").textContent = state.model ? `Model: ${state.model}.` : ""))
  .catch(() => say("The server does not answer.", true));
