// The map: words in grey, drawn once; learned positions over them, moving with the film.
const MOST_TRAILS = 200, MOST_LABELS = 16, MOST_FOUND = 12, ABSENT = 65535, NEAR = 9;

class MapPane {
  constructor(parent, store) {
    this.store = store;
    const { section, head, body } = pane(parent, "map", "Map");
    this.section = section;
    this.method = "pca";
    this.show = { trails: true, lines: true, lasso: false };
    const methods = element("select", head, { title: "how the map is made" });
    for (const name of ["pca", "umap"]) element("option", methods, { value: name }, name.toUpperCase());
    methods.addEventListener("change", () => this.project(methods.value));
    this.methods = methods;
    const toggle = (name, text, label) => {
      const node = button(head, text, label, () => {
        this.show[name] = !this.show[name];
        node.setAttribute("aria-pressed", this.show[name]);
        this.paint();
      });
      node.setAttribute("aria-pressed", this.show[name]);
    };
    toggle("trails", "trails", "show where each position came from");
    toggle("lines", "nearest", "show a line from each position to its nearest word");
    toggle("lasso", "lasso", "draw round positions to select them (or hold Shift)");
    this.search = element("input", head, { type: "search", placeholder: "find a word", size: 11 });
    this.search.setAttribute("aria-label", "find a word on the map; Enter selects the positions that it is nearest to");
    this.search.addEventListener("input", () => this.find());
    this.search.addEventListener("keydown", event => event.key === "Enter" && this.select(this.matches()));
    button(head, "+", "zoom in", () => this.zoom(1.5));
    button(head, "−", "zoom out", () => this.zoom(1 / 1.5));
    button(head, "fit", "show everything", () => { this.fit(); this.repaint(); });
    button(head, "⛶", "larger map, or back", () => { section.classList.toggle("dk-large"); });
    this.canvas = element("canvas", body, { tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.tip = element("div", body, { className: "dk-tip", hidden: true });
    this.legend = element("div", body, { className: "dk-legend" });
    this.numbers = element("p", section, { className: "dk-numbers", role: "status" });
    this.background = document.createElement("canvas");
    this.found = [];
    this.decode();
    this.bind();
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(body);
    store.listen(kind => {
      if (kind === CONTENT) { this.decode(); this.repaint(); }
      else if (kind === THEME) this.repaint();
      else this.paint();
      if (kind !== TIME && kind !== SELECTION) this.count();
    });
  }

  decode() {
    const { content, arrays } = this.store;
    if (!(this.method in content.maps)) this.method = "pca";
    this.methods.value = this.method;
    this.points = arrays[`${this.method}.points`];
    this.words = arrays[`${this.method}.words`];
    this.spots = arrays[`${this.method}.background`];
    this.spotOf = new Int32Array(this.store.words.length).fill(-1);
    this.words.forEach((word, spot) => { this.spotOf[word] = spot; });
    this.legend.replaceChildren();
    content.classes.forEach((name, label) => {
      const item = element("span", this.legend);
      element("i", item, { className: "dk-dot" }).style.background = classColour(label);
      item.append(name);
    });
    const item = element("span", this.legend);
    element("i", item, { className: "dk-dot" }).style.background = content.colours.real;
    item.append("words (dark: in the real text)");
    this.fit();
  }

  project(method) {
    const { store } = this;
    if (method in store.content.maps) { this.method = method; this.decode(); this.repaint(); this.count(); return; }
    this.numbers.textContent = `Fitting ${method.toUpperCase()} on words; this takes up to a minute …`;
    this.methods.value = this.method;
    store.order(["map", method], ({ reply }) => {
      if (reply.problem) this.numbers.textContent = reply.problem;
      else this.project(method);
    });
  }

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

  resize() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width) return;
    const height = this.section.classList.contains("dk-large") ? Math.round(0.75 * width) : clamp(Math.round(0.72 * width), 240, 400);
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
    pen.clearRect(0, 0, ...this.size);
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
    const chosen = new Set(store.get("selection"));
    const places = store.places.map(([of], place) => [place, of]);
    const close = places.filter(([place, of]) => of === example || chosen.has(place));
    if (show.trails) this.drawTrails(pen, time, count <= MOST_TRAILS ? places : close.slice(0, MOST_TRAILS));
    if (show.lines) this.drawLines(pen, time, frame, close);
    this.drawPoints(pen, time, places, example, chosen);
    this.drawLabels(pen, time, frame, close.filter(([, of]) => of === example));
    for (const spot of this.found) this.drawSpot(pen, spot);
    if (this.drawn) {
      pen.strokeStyle = ofNode(this.section, "--dk-text"); pen.setLineDash([4, 3]);
      pen.stroke(new Path2D(`M${this.drawn.map(([x, y]) => `${x} ${y}`).join("L")}`));
      pen.setLineDash([]);
    }
    this.canvas.setAttribute("aria-label", `Map of ${this.words.length} words and ${count} learned positions at ` +
      `${store.content.frames[frame]}; ${chosen.size} selected. Arrows move it, plus and minus zoom, 0 shows everything.`);
  }

  drawTrails(pen, time, places) {
    pen.lineWidth = 1.2;
    for (const [place, of] of places) {
      pen.strokeStyle = classColour(this.store.content.labels[of]);
      pen.globalAlpha = of === this.store.get("example") ? 0.75 : 0.25;
      pen.beginPath();
      for (let frame = 0; frame < time; frame++) {
        const spot = this.at(place, frame);
        if (spot) pen.lineTo(...spot);
      }
      const end = this.at(place, time);
      if (end) pen.lineTo(...end);
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
      if (spot === undefined || spot < 0 || !from) continue;
      pen.moveTo(...from);
      pen.lineTo(...this.screen(this.spots[2 * spot], this.spots[2 * spot + 1]));
    }
    pen.stroke();
    pen.setLineDash([]);
    pen.globalAlpha = 1;
  }

  drawPoints(pen, time, places, example, chosen) {
    const { labels } = this.store.content, small = places.length > 400, edge = ofNode(this.section, "--dk-page");
    const paths = new Map();
    for (const [place, of] of places) {
      const spot = this.at(place, time);
      if (!spot) continue;
      const near = of === example, key = `${labels[of]} ${near ? 1 : 0}`;
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
        pen.fillStyle = classColour(Number(label));
        pen.globalAlpha = near === "1" ? 1 : 0.7;
        pen.fill(path);
        if (!small || near === "1") pen.stroke(path);
      }
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = ofNode(this.section, "--dk-text");
    const looked = this.store.placeAt[this.store.cell(0, example, this.store.get("position"))];
    const matched = new Set(this.search.value ? this.matches() : []);
    for (const [place] of places) {
      if (place !== looked && place !== this.over && !chosen.has(place) && !matched.has(place)) continue;
      const spot = this.at(place, time);
      if (!spot) continue;
      pen.lineWidth = place === looked ? 2.5 : 1.5;
      pen.beginPath();
      pen.arc(...spot, place === looked ? 8 : 6, 0, 7);
      pen.stroke();
    }
  }

  drawLabels(pen, time, frame, places) {
    const taken = [], looked = this.store.get("position");
    const order = [...places].sort(([a], [b]) => (this.store.places[b][1] === looked) - (this.store.places[a][1] === looked));
    let drawn = 0;
    for (const [place] of order) {
      const spot = this.at(place, time), word = this.store.word(frame, ...this.store.places[place]);
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

  find() {
    const text = this.search.value.trim().toLowerCase();
    const rank = word => word === text ? 0 : word.startsWith(text) ? 1 : 2;
    const spots = text ? [...this.words.keys()].filter(s => this.store.words[this.words[s]].toLowerCase().includes(text)) : [];
    spots.sort((a, b) => rank(this.store.words[this.words[a]].toLowerCase()) - rank(this.store.words[this.words[b]].toLowerCase()));
    this.found = spots.slice(0, MOST_FOUND);
    this.paint();
    if (text) this.numbers.textContent = `${spots.length} words contain “${text}”; it is in the nearest word of ` +
      `${this.matches().length} positions (Enter selects them).`;
    else this.count();
  }

  matches() {
    const text = this.search.value.trim().toLowerCase(), { store } = this, frame = Math.round(store.time);
    return text ? [...store.places.keys()].filter(p => store.word(frame, ...store.places[p])?.toLowerCase().includes(text)) : [];
  }

  select(places) { this.store.set({ selection: places }); }

  zoom(factor, x = this.size[0] / 2, y = this.size[1] / 2) {
    const { view, size } = this;
    view.x += (x - size[0] / 2) / view.scale * (1 - 1 / factor);
    view.y -= (y - size[1] / 2) / view.scale * (1 - 1 / factor);
    view.scale *= factor;
    this.repaint();
  }

  bind() {
    const { canvas } = this;
    let held = null;
    const where = event => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", event => {
      if (!event.ctrlKey && document.activeElement !== canvas) return;  // a notebook scrolls until the map is clicked
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), ...where(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      held = { from: where(event), last: where(event), lasso: this.show.lasso || event.shiftKey, moved: false };
      this.drawn = held.lasso ? [held.from] : null;
    });
    canvas.addEventListener("pointermove", event => {
      const spot = where(event);
      if (!held) { this.hover(spot); return; }
      held.moved ||= Math.hypot(spot[0] - held.from[0], spot[1] - held.from[1]) > 3;
      if (held.lasso) { this.drawn.push(spot); this.paint(); }
      else if (held.moved) {
        this.view.x -= (spot[0] - held.last[0]) / this.view.scale;
        this.view.y += (spot[1] - held.last[1]) / this.view.scale;
        this.repaint();
      }
      held.last = spot;
    });
    canvas.addEventListener("pointerup", event => {
      if (held?.lasso && held.moved) this.select(this.inside(this.drawn));
      else if (held && !held.moved) {
        const place = this.nearest(where(event));
        if (place >= 0) this.store.look(...this.store.places[place]);
      }
      held = this.drawn = null;
      this.paint();
    });
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; this.over = -1; this.paint(); });
    canvas.addEventListener("keydown", event => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (way) { this.view.x += 40 * way[0] / this.view.scale; this.view.y += 40 * way[1] / this.view.scale; this.repaint(); }
      else if (event.key === "+" || event.key === "=") this.zoom(1.3);
      else if (event.key === "-") this.zoom(1 / 1.3);
      else if (event.key === "0") { this.fit(); this.repaint(); }
      else if (event.key === "Escape") this.select([]);
      else return;
      event.preventDefault();
      event.stopPropagation();  // else the notebook moves to another cell
    });
  }

  nearest([x, y]) {
    let best = -1, least = NEAR ** 2;
    for (let place = 0; place < this.store.places.length; place++) {
      const spot = this.at(place, this.store.time);
      const away = spot ? (spot[0] - x) ** 2 + (spot[1] - y) ** 2 : Infinity;
      if (away < least) { best = place; least = away; }
    }
    return best;
  }

  nearestSpot([x, y]) {
    let best = -1, least = 25;
    for (let spot = 0; spot < this.words.length; spot++) {
      const at = this.screen(this.spots[2 * spot], this.spots[2 * spot + 1]);
      const away = (at[0] - x) ** 2 + (at[1] - y) ** 2;
      if (away < least) { best = spot; least = away; }
    }
    return best;
  }

  hover(spot) {
    const { store } = this, place = this.nearest(spot), frame = Math.round(store.time);
    let text = "";
    if (place >= 0) {
      const [example, position] = store.places[place], label = store.content.labels[example];
      const away = store.arrays.distances[store.cell(frame, example, position)];
      text = `${store.word(frame, example, position)}\nexample ${example + 1}, position ${position} · ${store.content.classes[label]}` +
        `\n${away.toFixed(1)} word distances from that word`;
    } else {
      const near = this.nearestSpot(spot);
      if (near >= 0) text = store.words[this.words[near]];
    }
    this.over = place;
    this.tip.hidden = !text;
    this.tip.textContent = text;
    const left = spot[0] > this.size[0] - 200;
    this.tip.style.left = left ? "" : `${spot[0] + 14}px`;
    this.tip.style.right = left ? `${this.size[0] - spot[0] + 14}px` : "";
    this.tip.style.top = `${Math.max(0, spot[1] - 10)}px`;
    this.paint();
  }

  inside(polygon) {
    return [...this.store.places.keys()].filter(place => {
      const spot = this.at(place, this.store.time);
      let within = false;
      for (let i = 0, j = polygon.length - 1; spot && i < polygon.length; j = i++) {
        const [x, y] = polygon[i], [u, v] = polygon[j];
        if (y > spot[1] !== v > spot[1] && spot[0] < (u - x) * (spot[1] - y) / (v - y) + x) within = !within;
      }
      return within;
    });
  }

  count() {
    const { store } = this, map = store.content.maps[this.method], frame = Math.round(store.time);
    const kept = `The map keeps ${percent(map.preserved)} of 10 nearest neighbours (shuffled: ${percent(map.shuffled)}).`;
    const answer = store.ask(["numbers", frame], () => this.count());
    if (this.search.value.trim()) return;
    const own = answer?.reply?.own;
    const shares = !answer ? " Own class: counting …" : !own ? " Own class: needs two examples of a class."
      : ` Neighbours in other examples of the own class at ${store.content.frames[frame]}: ${percent(own.share)} ` +
        `(chance ${percent(own.chance)}, random shift ${percent(own.control)}).`;
    this.numbers.textContent = kept + shares;
  }

  close() { this.sizes.disconnect(); cancelAnimationFrame(this.waiting); }
}
