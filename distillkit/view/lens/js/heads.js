// Heads: a thumbnail of every head, attention in the frame minus attention in real text; one head enlarged, with arcs.
const FULL_SCALE = 0.5, GAP = 2, MARGIN = 16, LEAST = 32;

class HeadsPane {
  constructor(parent, store) {
    this.store = store;
    const { section, head, body } = pane(parent, "heads", "Heads");
    this.section = section;
    this.back = button(head, "← all heads", "show all heads", () => { this.head = null; this.draw(); });
    const legend = element("span", head, { className: "dk-scale" });
    legend.append(`−${FULL_SCALE} `, element("i", legend, { className: "dk-ramp dk-two" }), ` +${FULL_SCALE}`);
    legend.title = "attention in the frame minus attention in real text; white at zero; beyond the ends the last colour";
    this.canvas = element("canvas", body, { tabIndex: 0 });
    this.note = element("p", section, { className: "dk-numbers", role: "status" });
    this.head = null;
    this.cursor = [0, 0];
    this.bind();
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(body);
    store.listen(kind => { if (!UNCHANGED.includes(kind) || (kind === OVER && this.head)) this.draw(); });
  }

  draw() {
    const { store } = this, question = ["attention", store.get("revision"), store.get("frame"), store.get("example")];
    const { clientWidth: width, clientHeight: room } = this.canvas.parentElement;
    if (!width) return;
    const answer = store.ask(question, () => this.draw());
    this.back.hidden = this.head === null;
    if (!answer) { this.note.textContent = "computing attention …"; return; }
    if (answer.reply.problem) {
      this.note.textContent = answer.reply.problem;
      this.shape = null;
      fitted(this.canvas, width, 1);
      return;
    }
    const [sets, layers, heads, length] = answer.reply.shape;
    this.shape = { sets, layers, heads, length };
    this.weights = new Uint8Array(answer.buffers[0]);
    if (this.head === null) this.drawAll(width, room); else this.drawOne(width, room);
  }

  // The weight that position i gives to j: of set 0, real text, or of the last, the frame.
  weight(set, layer, head, i, j) {
    const { layers, heads, length } = this.shape;
    return this.weights[(((set * layers + layer) * heads + head) * length + i) * length + j] / 255;
  }

  difference(layer, head, i, j) {
    const { sets } = this.shape;
    return sets > 1 ? this.weight(1, layer, head, i, j) - this.weight(0, layer, head, i, j) : this.weight(0, layer, head, i, j);
  }

  // The position that looks: the one under the pointer, else the one that is looked at.
  row() {
    const { store } = this, [example, position] = store.over ?? [];
    return example === store.get("example") ? position : store.get("position");
  }

  picture(layer, head) {
    const { length } = this.shape, canvas = document.createElement("canvas");
    canvas.width = canvas.height = length;
    const pen = canvas.getContext("2d"), image = pen.createImageData(length, length);
    for (let i = 0; i < length; i++) {
      for (let j = 0; j < length; j++) {
        image.data.set([...diverging(this.difference(layer, head, i, j) / FULL_SCALE), 255], 4 * (i * length + j));
      }
    }
    pen.putImageData(image, 0, 0);
    return canvas;
  }

  // As wide as the pane; as high as it has room for, up to twice the width, so that few layers leave no gap below them.
  drawAll(width, room) {
    const { layers, heads, length } = this.shape;
    const side = this.side = (width - MARGIN) / heads;
    const tall = this.tall = clamp((room - MARGIN) / layers, Math.min(side, LEAST), 2 * side);
    this.canvas.parentElement.style.minHeight = `${MARGIN + Math.min(side, LEAST) * layers}px`;
    const pen = fitted(this.canvas, width, MARGIN + tall * layers);
    pen.fillStyle = ofNode(this.section, "--dk-text");
    pen.font = "10px system-ui, sans-serif";
    pen.imageSmoothingEnabled = side < length;
    for (let layer = 0; layer < layers; layer++) {
      pen.fillText(layer + 1, 2, MARGIN + tall * (layer + 0.5) + 4);
      for (let head = 0; head < heads; head++) {
        if (layer === 0) pen.fillText(head + 1, MARGIN + side * (head + 0.35), 11);
        pen.drawImage(this.picture(layer, head), MARGIN + side * head, MARGIN + tall * layer, side - GAP, tall - GAP);
      }
    }
    const [layer, head] = this.cursor = [Math.min(this.cursor[0], layers - 1), Math.min(this.cursor[1], heads - 1)];
    this.frame(pen, MARGIN + side * head - 1, MARGIN + tall * layer - 1, side, tall);
    let total = 0;
    for (let i = 0; i < length; i++) for (let j = 0; j < length; j++) total += Math.abs(this.difference(layer, head, i, j));
    this.tell(`Layer ${layer + 1}, head ${head + 1}: ${(total / 2 / length).toFixed(2)} of a position's attention moved ` +
      "(mean). Rows look at columns; click to enlarge.");
  }

  drawOne(width, room) {
    const { length, sets } = this.shape, [layer, head] = this.head, { store } = this;
    const example = store.get("example"), frame = store.get("frame");
    const unit = clamp((room - 6) / length, 10, 22), height = unit * length + 6;
    const side = Math.min(unit * length, width * 0.5), names = side + 8, arcs = names + 84;
    const pen = fitted(this.canvas, width, height);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.picture(layer, head), 0, 0, side, unit * length);
    const row = Math.min(this.row(), length - 1);
    this.frame(pen, 1, unit * row, side - 2, unit);
    pen.fillStyle = ofNode(this.section, "--dk-text");
    for (let i = 0; i < length; i++) {
      pen.font = `${i === row ? "bold " : ""}${Math.min(12, unit)}px system-ui, sans-serif`;
      const word = store.word(frame, example, i) ?? "";
      pen.fillText(word.length > 12 ? `${word.slice(0, 11)}…` : word, names, unit * (i + 0.78));
    }
    const colours = sets > 1 ? [store.content.colours.real, store.content.colours.learned] : [store.content.colours.learned];
    colours.forEach((colour, set) => {
      pen.strokeStyle = colour;
      for (let j = 0; j < length; j++) {
        const weight = this.weight(set, layer, head, row, j);
        if (weight < 0.02) continue;
        const from = unit * (row + 0.5), to = unit * (j + 0.5), reach = 12 + (width - arcs - 16) * Math.abs(row - j) / length;
        pen.lineWidth = 0.5 + 8 * weight;
        pen.globalAlpha = 0.75;
        pen.beginPath();
        pen.moveTo(arcs, from + set * 2);
        pen.bezierCurveTo(arcs + reach, from + set * 2, arcs + reach, to + set * 2, arcs, to + set * 2);
        pen.stroke();
      }
    });
    pen.globalAlpha = 1;
    this.unit = unit;
    const weight = (set, j) => this.weight(set, layer, head, row, j);
    const order = [...Array(length).keys()].sort((a, b) => weight(sets - 1, b) - weight(sets - 1, a));
    const looks = order.slice(0, 3).map(j => `“${store.word(frame, example, j)}” ${weight(sets - 1, j).toFixed(2)}` +
      (sets > 1 ? ` (real ${weight(0, j).toFixed(2)})` : ""));
    this.tell(`Layer ${layer + 1}, head ${head + 1}: “${store.word(frame, example, row)}” looks at ${looks.join(", ")}. ` +
      "Arcs: blue frame, grey real.");
  }

  // A frame that is seen on white pictures, in the dark too.
  frame(pen, ...box) {
    for (const [width, name] of [[4, "--dk-page"], [2, "--dk-text"]]) {
      pen.lineWidth = width;
      pen.strokeStyle = ofNode(this.section, name);
      pen.strokeRect(...box);
    }
  }

  tell(text) {
    this.note.textContent = text;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${text} Arrows move, Enter enlarges, Escape goes back.`);
  }

  bind() {
    const { canvas, store } = this;
    const where = event => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const headAt = ([x, y]) => {
      const head = Math.floor((x - MARGIN) / this.side), layer = Math.floor((y - MARGIN) / this.tall);
      const inside = this.shape && Math.min(head, layer) >= 0 && head < this.shape.heads && layer < this.shape.layers;
      return inside ? [layer, head] : null;
    };
    canvas.addEventListener("pointermove", event => {
      if (this.head === null) {
        const over = headAt(where(event));
        if (over && String(over) !== String(this.cursor)) { this.cursor = over; this.draw(); }
      } else if (this.shape) {
        store.hover(store.get("example"), clamp(Math.floor(where(event)[1] / this.unit), 0, this.shape.length - 1));
      }
    });
    canvas.addEventListener("pointerleave", () => store.hover());
    canvas.addEventListener("click", event => {
      if (this.head === null) { const over = headAt(where(event)); if (over) this.enlarge(over); }
      else if (store.over) store.look(...store.over);
    });
    canvas.addEventListener("keydown", event => {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (way && this.shape && this.head === null) {
        const sizes = [this.shape.layers, this.shape.heads];
        this.cursor = this.cursor.map((place, axis) => clamp(place + way[axis], 0, sizes[axis] - 1));
        this.draw();
      } else if (way && this.shape) {
        store.hover(store.get("example"), clamp(this.row() + way[0] + way[1], 0, this.shape.length - 1));
      } else if (event.key === "Enter") this.enlarge(this.cursor);
      else if (event.key === "Escape") { this.head = null; this.draw(); }
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  enlarge(head) { this.head = this.cursor = head; this.draw(); }

  close() { this.sizes.disconnect(); }
}
