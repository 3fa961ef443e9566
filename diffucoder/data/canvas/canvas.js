// A canvas as it stands after some steps: what the server's page and the report on order both draw.
// A row is { canvas: [text, or null where masked], steps: [{ committed: [{ position, text, bytes, log_prob }], revoked: [position] }] }.

// Red, green and blue of both ends of the ramp, which the style sheet defines.
const [FIRST, LAST] = ["--first", "--last"].map((name) => {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
});

export function ramp(share) {
  return FIRST.map((first, channel) => Math.round(first + (LAST[channel] - first) * share));
}

const colour = (share) => `rgb(${ramp(share).join(" ")})`;

// how a token is coloured: a colour, from the cell and its row
export const shades = {
  order: (cell, row) => colour(cell.step / Math.max(row.steps.length - 1, 1)),
  sure: (cell) => colour(1 - cell.sure),
};

export function standing(row, upTo) {
  const cells = row.canvas.map((text) => (text === null ? null : { text, known: true }));
  row.steps.slice(0, upTo).forEach((step, index) => {
    for (const at of step.revoked) cells[at] = null;
    for (const { position, text, bytes, log_prob } of step.committed)
      cells[position] = { position, text, bytes, step: index, sure: Math.exp(log_prob) };
  });
  return cells;
}

export function isControl(text) {
  return /^<\|.*\|>$/.test(text);
}

// The text of each cell; a character of several tokens, which come with their bytes, belongs to the last of them.
function texts(cells) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return cells.map((cell) =>
    cell?.bytes ? decoder.decode(new Uint8Array(cell.bytes), { stream: true }) : decoder.decode() + (cell?.text ?? ""),
  );
}

export function spans(row, upTo, shade) {
  const cells = standing(row, upTo);
  const shown = texts(cells);
  const made = [];
  let ended = false;
  let settled = true;
  for (const [index, cell] of cells.entries()) {
    const span = document.createElement("span");
    if (cell === null) {
      settled = false;
      span.className = "mask";
      span.textContent = "▢";
    } else if (!cell.known && (ended || isControl(cell.text))) {
      ended ||= settled;
      span.className = "end";
      span.textContent = ended ? "" : "·";
    } else {
      span.className = cell.known ? "known" : "token";
      if (!cell.known) {
        span.style.setProperty("--colour", shade(cell, row));
        span.title = `step ${cell.step + 1}, probability ${cell.sure.toFixed(3)}`;
        if (cell.step === upTo - 1) span.classList.add("new");
      }
      span.textContent = shown[index];
    }
    made.push(span);
  }
  return made;
}
