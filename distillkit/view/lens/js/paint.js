// How the map is drawn: words once, on a layer of their own; learned positions and their trails for every moment of the film.
const MOST_TRAILS = 400, MOST_LABELS = 16, ABSENT = 65535;

class MapPaint {
  // The view: the middle of the map, and pixels per unit.
  fit() {
    const all = [[], []];
    for (let i = 0; i < this.spots.length; i++) all[i % 2].push(this.spots[i]);
    for (const axis of all) axis.sort((a, b) => a - b);
    const inner = all.map(axis => [axis[Math.floor(axis.length * 0.002)], axis[Math.ceil(axis.length * 0.998) - 1]]);
    for (let i = 0; i < this.points.length; i++) {
      const value = this.points[i], range = inner[i % 2];
      if (value !== ABSENT) { range[0] = Math.min(range[0], value); range[1] = Math.max(range[1], value); }
    }
    const [width, height] = this.size ?? [600, 400];
    const spans = inner.map(([least, most]) => Math.max(1, most - least));
    this.view = { x: (inner[0][0] + inner[0][1]) / 2, y: (inner[1][0] + inner[1][1]) / 2,
                  scale: 0.92 * Math.min(width / spans[0], height / spans[1]) };
  }

  screen(x, y) {
    const { view, size } = this;
    return [size[0] / 2 + (x - view.x) * view.scale, size[1] / 2 - (y - view.y) * view.scale];
  }

  // Where a learned position is at a time between two frames; null where it is absent.
  at(place, time) {
    const { points } = this, count = this.store.places.length;
    const before = Math.floor(time), share = time - before, i = 2 * (before * count + place);
    if (points[i] === ABSENT) return null;
    let x = points[i], y = points[i + 1];
    const j = i + 2 * count;
    if (share && points[j] !== ABSENT) { x += share * (points[j] - x); y += share * (points[j + 1] - y); }
    return this.screen(x, y);
  }

  // The edited positions of the frame that is shown: place → where its new word is, as far as Python has said it.
  edited(time) {
    const { store } = this, { least, unit } = store.content.maps[this.method].scale, moves = new Map();
    for (const { frame, example, position, token } of store.get("edits")) {
      const answer = frame === time && store.ask(["place", this.method, token], () => this.paint());
      if (!answer?.reply?.at) continue;
      const [x, y] = answer.reply.at.map((value, axis) => (value - least[axis]) / unit);
      moves.set(store.placeAt[store.cell(0, example, position)], this.screen(x, y));
    }
    return moves;
  }

  // Where a position is on the screen, an edited one where its new word is.
  spot(place) { return this.moves.get(place) ?? this.at(place, this.store.time); }

  resize() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const large = this.section.classList.contains("dk-large");
    const height = large ? Math.round(0.75 * width) : clamp(Math.round(0.72 * width), 240, 400);
    if (this.size && this.size[0] === width && this.size[1] === height) return;
    const first = !this.size;
    if (this.size) this.view.scale *= width / this.size[0];
    this.size = [width, height];
    if (first) this.fit();
    this.repaint();
  }

  repaint() {
    if (!this.size) return;
    const pen = fitted(this.background, ...this.size), { in_text: inText } = this.store.arrays;
    const shades = [ofNode(this.section, "--dk-word"), ofNode(this.section, "--dk-word-in-text")];
    for (const real of [0, 1]) {
      pen.fillStyle = shades[real];
      for (let spot = 0; spot < this.words.length; spot++) {
        if (inText[this.words[spot]] !== real) continue;
        const [x, y] = this.screen(this.spots[2 * spot], this.spots[2 * spot + 1]);
        pen.fillRect(x - 0.8, y - 0.8, 1.6, 1.6);
      }
    }
    this.paint();
  }

  paint() {
    if (!this.size || this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.draw(); });
  }

  draw() {
    const { store, show } = this, time = store.time, frame = Math.round(time), example = store.get("example");
    const pen = fitted(this.canvas, ...this.size), count = store.places.length;
    pen.drawImage(this.background, 0, 0, ...this.size);
    this.moves = this.edited(time);
    const chosen = new Set(store.get("selection"));
    const places = store.places.map(([of], place) => [place, of]);
    const close = places.filter(([place, of]) => of === example || chosen.has(place));
    if (show.trails) this.drawTrails(pen, time, count <= MOST_TRAILS ? places : close.slice(0, MOST_TRAILS));
    if (show.lines) this.drawLines(pen, time, frame, close);
    this.drawPoints(pen, time, places, example, chosen);
    this.drawEdits(pen, time, frame);
    this.drawLabels(pen, frame, close.filter(([, of]) => of === example));
    for (const spot of this.found) this.drawSpot(pen, spot);
    if (this.drawn) {
      pen.strokeStyle = ofNode(this.section, "--dk-text"); pen.setLineDash([4, 3]);
      pen.stroke(new Path2D(`M${this.drawn.map(([x, y]) => `${x} ${y}`).join("L")}`));
      pen.setLineDash([]);
    }
    this.canvas.setAttribute("aria-label", `Map of ${this.words.length} words and ${count} learned positions at ` +
      `${store.content.frames[frame]}; ${chosen.size} selected, ${this.moves.size} edited. Arrows move it, plus and minus zoom, 0 shows everything.`);
  }

  drawTrails(pen, time, places) {
    pen.lineWidth = 1.2;
    for (const [place, of] of places) {
      const end = this.at(place, time);
      if (!end) continue;
      pen.strokeStyle = this.store.colour(this.store.label(Math.round(time), of));
      pen.globalAlpha = of === this.store.get("example") ? 0.75 : 0.25;
      pen.beginPath();
      for (let frame = 0; frame < time; frame++) {
        const spot = this.at(place, frame);
        if (spot) pen.lineTo(...spot);
      }
      pen.lineTo(...end);
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  drawLines(pen, time, frame, places) {
    pen.strokeStyle = ofNode(this.section, "--dk-text");
    pen.lineWidth = 0.8;
    pen.globalAlpha = 0.55;
    pen.setLineDash([2, 3]);
    pen.beginPath();
    for (const [place] of places) {
      const spot = this.spotOf[this.store.arrays.tokens[this.store.cell(frame, ...this.store.places[place])]];
      const from = this.at(place, time);
      if (spot === undefined || spot < 0 || !from || this.moves.has(place)) continue;
      pen.moveTo(...from);
      pen.lineTo(...this.screen(this.spots[2 * spot], this.spots[2 * spot + 1]));
    }
    pen.stroke();
    pen.setLineDash([]);
    pen.globalAlpha = 1;
  }

  // A line from each learned point to the word that was put in its place, and a square there.
  drawEdits(pen, time, frame) {
    for (const [place, [x, y]] of this.moves) {
      const line = new Path2D();
      line.moveTo(...this.at(place, time));
      line.lineTo(x, y);
      line.rect(x - 5, y - 5, 10, 10);
      for (const [width, name] of [[5, "--dk-page"], [2, "--dk-text"]]) {
        pen.lineWidth = width;
        pen.strokeStyle = ofNode(this.section, name);
        pen.stroke(line);
      }
      pen.fillStyle = this.store.colour(this.store.label(frame, this.store.places[place][0]));
      pen.fillRect(x - 4, y - 4, 8, 8);
    }
  }

  drawPoints(pen, time, places, example, chosen) {
    const frame = Math.round(time), small = places.length > 400, edge = ofNode(this.section, "--dk-page");
    const paths = new Map();
    for (const [place, of] of places) {
      const spot = this.at(place, time);
      if (!spot) continue;
      const near = of === example, key = `${this.store.label(frame, of)} ${near ? 1 : 0}`;
      if (!paths.has(key)) paths.set(key, new Path2D());
      const path = paths.get(key), r = near ? 5 : small ? 2 : 3.5;
      path.moveTo(spot[0] + r, spot[1]);
      path.arc(...spot, r, 0, 7);
    }
    pen.lineWidth = 1;
    pen.strokeStyle = edge;
    for (const near of ["0", "1"]) {
      for (const [key, path] of paths) {
        const [label, of] = key.split(" ");
        if (of !== near) continue;
        pen.fillStyle = this.store.colour(Number(label));
        pen.globalAlpha = near === "1" ? 1 : 0.7;
        pen.fill(path);
        if (!small || near === "1") pen.stroke(path);
      }
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = ofNode(this.section, "--dk-text");
    const looked = this.store.placeAt[this.store.cell(0, example, this.store.get("position"))];
    const over = this.store.over ? this.store.placeAt[this.store.cell(0, ...this.store.over)] : -1;
    const matched = new Set(this.search.value ? this.matches() : []);
    for (const [place] of places) {
      if (place !== looked && place !== over && !chosen.has(place) && !matched.has(place)) continue;
      const spot = this.spot(place);
      if (!spot) continue;
      pen.lineWidth = place === looked ? 2.5 : 1.5;
      pen.beginPath();
      pen.arc(...spot, place === looked ? 8 : 6, 0, 7);
      pen.stroke();
    }
  }

  drawLabels(pen, frame, places) {
    const taken = [], looked = this.store.get("position");
    const rank = place => (this.store.places[place][1] === looked ? 2 : 0) + (this.moves.has(place) ? 1 : 0);
    const order = [...places].sort(([a], [b]) => rank(b) - rank(a));
    let drawn = 0;
    for (const [place] of order) {
      const spot = this.spot(place), word = this.store.word(frame, ...this.store.places[place]);
      if (!spot || word === null || drawn >= MOST_LABELS) continue;
      drawn += this.label(pen, word, spot[0] + 8, spot[1] + 4, taken);
    }
  }

  label(pen, text, x, y, taken) {
    pen.font = "12px system-ui, sans-serif";
    const width = pen.measureText(text).width, box = [x - 2, y - 11, x + width + 2, y + 3];
    if (x + width > this.size[0]) { box[0] -= width + 18; box[2] -= width + 18; x -= width + 18; }
    if (taken.some(([a, b, c, d]) => box[0] < c && box[2] > a && box[1] < d && box[3] > b)) return 0;
    taken.push(box);
    pen.lineWidth = 3;
    pen.lineJoin = "round";
    pen.strokeStyle = ofNode(this.section, "--dk-page");
    pen.strokeText(text, x, y);
    pen.fillStyle = ofNode(this.section, "--dk-text");
    pen.fillText(text, x, y);
    return 1;
  }

  drawSpot(pen, spot) {
    const [x, y] = this.screen(this.spots[2 * spot], this.spots[2 * spot + 1]);
    pen.fillStyle = pen.strokeStyle = ofNode(this.section, "--dk-text");
    pen.lineWidth = 1.5;
    pen.strokeRect(x - 4, y - 4, 8, 8);
    this.label(pen, this.store.words[this.words[spot]], x + 8, y + 4, []);
  }
}
