// Tokens: each position of an example as a column: the real word, and below it the nearest word of the frame, coloured.
const COLOURINGS = {
  distance: ["distance", "word distances from the nearest word"],
  change: ["change", "word distances from the first frame"],
  attention: ["attention", "× the attention that an average position gets"],
  value: ["training value", "rise of the outer loss without the position"],
};

class TokensPane {
  constructor(parent, store) {
    this.store = store;
    const { section, head, body } = pane(parent, "tokens", "Tokens");
    this.body = body;
    this.colouring = "distance";
    const group = element("span", head, { className: "dk-choice", role: "group" });
    group.setAttribute("aria-label", "what colours the words");
    this.choices = Object.entries(COLOURINGS).map(([name, [text, label]]) => {
      const node = button(group, text, `colour by: ${label}`, () => { this.colouring = name; this.draw(); });
      node.dataset.colouring = name;
      return node;
    });
    this.scale = element("span", head, { className: "dk-scale", role: "status" });
    this.note = element("p", section, { className: "dk-numbers", role: "status" });
    store.listen(kind => { if (!UNCHANGED.includes(kind)) this.draw(); });
    this.draw();
  }

  // A number for each position, and how to read it; text in place of numbers while there are none.
  numbers() {
    const { store, colouring } = this, frame = store.get("frame"), example = store.get("example");
    const start = store.cell(frame, example, 0);
    if (colouring === "distance" || colouring === "change") {
      return [...store.arrays[colouring === "distance" ? "distances" : "moved"].subarray(start, start + store.length)];
    }
    const again = () => this.draw();
    if (colouring === "attention") {
      const answer = store.ask(["attention", store.get("revision"), frame, example], again);
      if (!answer) return "computing attention …";
      return answer.reply.problem ?? received(answer);
    }
    if (!store.content.has_judge) return "training value needs Lens(…, judge=…)";
    const answer = store.ask(["values", store.get("revision"), frame, example], again,
      share => { this.scale.textContent = `leaving out each position: ${percent(share)}`; });
    return answer ? answer.reply.problem ?? answer.reply.values : "leaving out each position …";
  }

  draw() {
    const { store, body, colouring } = this, frame = store.get("frame"), example = store.get("example");
    for (const node of this.choices) node.setAttribute("aria-pressed", node.dataset.colouring === colouring);
    const numbers = this.numbers(), known = Array.isArray(numbers);
    const finite = known ? numbers.filter(value => value !== null && Number.isFinite(value)) : [];
    const both = colouring === "value", top = Math.max(1e-9, ...finite.map(Math.abs));
    const least = both ? 0 : Math.min(top, ...finite);
    this.scale.replaceChildren();
    if (!known) this.scale.textContent = numbers;
    else {
      const ramp = element("i", this.scale, { className: both ? "dk-ramp dk-two" : "dk-ramp" });
      this.scale.prepend(both ? signed(-top, 4) : least.toFixed(1));
      this.scale.append(both ? signed(top, 4) : top.toFixed(1), ` ${COLOURINGS[colouring][1]}`);
      ramp.setAttribute("aria-label", "to");
    }
    const focus = body.contains(document.activeElement);
    body.replaceChildren();
    for (const [positions, pieces, alike] of this.stretches()) {
      const stretch = element("div", body, { className: alike ? "dk-stretch" : "dk-stretch dk-cut" });
      const columns = element("div", stretch);
      for (const position of positions) {
        const word = store.word(frame, example, position), real = store.realWord(example, position);
        if (word !== null || real !== null) this.column(columns, position, word, real, focus, known, numbers, [least, top, both]);
      }
      const row = pieces.length ? element("div", stretch) : null;
      for (const [text, read] of pieces) element(read ? "span" : "s", row, { className: "dk-piece", dir: "auto" }, text);
    }
  }

  // Positions that stand above the pieces of another model's tokenizer; without such a model each stands alone.
  stretches() {
    const { store, note } = this, alone = [...Array(store.length).keys()].map(position => [[position], [], true]);
    const { reader } = store.content;
    note.hidden = !reader;
    if (!reader) return alone;
    const answer = store.ask(["reading", ...["revision", "frame", "example"].map(name => store.get(name))], () => this.draw());
    note.textContent = !answer ? `${reader} reads …` : answer.reply.problem;
    if (!answer?.reply.stretches) return alone;
    const pieces = answer.reply.stretches.flatMap(([, some]) => some), lost = pieces.filter(([, read]) => !read).length;
    note.textContent = `Below: ${reader} needs ${pieces.length} tokens and reads ${pieces.length - lost}. ` +
      "Violet: cut differently. Struck through: not read (no room, or unknown).";
    return answer.reply.stretches;
  }

  column(parent, position, word, real, focus, known, numbers, [least, top, both]) {
    const { store, colouring } = this, frame = store.get("frame"), example = store.get("example");
    const column = element("div", parent, { className: "dk-column" });
    element("span", column, { className: "dk-real", dir: "auto" }, real ?? "∅");
    const learned = store.placeAt[store.cell(0, example, position)] >= 0;
    const chip = element("button", column, { type: "button", className: "dk-chip", dir: "auto" }, word ?? "∅");
    chip.disabled = !learned;
    const value = known ? numbers[position] : null;
    if (value !== null && Number.isFinite(value)) {
      const share = (Math.abs(value) - least) / Math.max(1e-9, top - least);
      chip.style.background = rgba(value < 0 ? LESS : MORE, 0.62 * share);
      chip.title = `position ${position}: ${both ? signed(value, 4) : value.toFixed(2)} ${COLOURINGS[colouring][1]}`;
    }
    if (store.edit(frame, example, position)) chip.classList.add("dk-edited");
    const looked = position === store.get("position");
    chip.setAttribute("aria-pressed", looked);
    chip.tabIndex = looked ? 0 : -1;
    if (looked && focus) chip.focus();
    chip.addEventListener("click", () => store.look(example, position));
    column.addEventListener("pointerenter", () => store.hover(example, position));
    column.addEventListener("pointerleave", () => store.hover());
    chip.addEventListener("keydown", event => this.step(event, position));
  }

  step(event, position) {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key], { store } = this, example = store.get("example");
    if (!way) return;
    event.preventDefault();
    event.stopPropagation();
    for (let next = position + way; next >= 0 && next < store.length; next += way) {
      if (store.placeAt[store.cell(0, example, next)] >= 0) { store.look(example, next); return; }
    }
  }
}

// The attention that each position gets in the frame, over layers, heads and positions that look; the mean position gets 1.
function received({ reply, buffers }) {
  const [sets, layers, heads, length] = reply.shape, size = layers * heads * length * length;
  const weights = new Uint8Array(buffers[0]).subarray((sets - 1) * size), sums = new Array(length).fill(0);
  weights.forEach((weight, i) => { sums[i % length] += weight; });
  const present = sums.filter(sum => sum > 0);
  const mean = present.reduce((a, b) => a + b, 0) / Math.max(1, present.length);
  return sums.map(sum => sum > 0 ? sum / mean : null);
}
