// The map: words in grey, learned positions in the colours of their classes; hover, zoom, lasso, search.
const MOST_FOUND = 12, NEAR = 9;

class MapPane extends MapPaint {
  constructor(parent, store) {
    super();
    this.store = store;
    const { section, head, body } = pane(parent, "map", "Map");
    this.section = section;
    this.method = "pca";
    this.show = { trails: !store.content.choices, lines: true, lasso: false };  // between sets nothing has moved
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
    button(head, "larger", "larger map, or back", () => { section.classList.toggle("dk-large"); });
    this.canvas = element("canvas", body, { tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.tip = element("div", body, { className: "dk-tip", hidden: true });
    this.legend = element("div", body, { className: "dk-legend" });
    this.numbers = element("p", section, { className: "dk-numbers", role: "status" });
    this.background = document.createElement("canvas");
    this.found = [];
    this.moves = new Map();
    this.decode();
    this.bind();
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(body);
    store.listen(kind => {
      if (kind === LIVE) return;
      if (kind === CONTENT) { this.decode(); this.repaint(); }
      else if (kind === THEME) this.repaint();
      else this.paint();
      if (![TIME, SELECTION, OVER].includes(kind)) this.count();
    });
  }

  decode() {
    const { store } = this, { content, arrays } = store;
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
      element("i", item, { className: "dk-dot" }).style.background = store.colour(label);
      item.append(name);
    });
    const item = element("span", this.legend);
    element("i", item, { className: "dk-dot" }).style.background = content.colours.real;
    item.append("words (stronger: in the real text)");
    this.fit();
  }

  project(method) {
    const { store } = this;
    if (method in store.content.maps) { this.method = method; this.decode(); this.repaint(); this.count(); return; }
    this.numbers.textContent = `Fitting ${method.toUpperCase()} on words; this may take minutes …`;
    this.methods.value = this.method;
    store.order(["map", method], ({ reply }) => {
      if (reply.problem) this.numbers.textContent = reply.problem;
      else this.project(method);
    });
  }

  find() {
    const text = this.search.value.trim().toLowerCase();
    const wordAt = spot => this.store.words[this.words[spot]].toLowerCase();
    const rank = spot => wordAt(spot) === text ? 0 : wordAt(spot).startsWith(text) ? 1 : 2;
    const spots = text ? [...this.words.keys()].filter(spot => wordAt(spot).includes(text)) : [];
    spots.sort((a, b) => rank(a) - rank(b));
    this.found = spots.slice(0, MOST_FOUND);
    this.paint();
    if (text) this.numbers.textContent = `${spots.length} words contain “${text}”; it is in the nearest word of ` +
      `${this.matches().length} positions (Enter selects them).`;
    else this.count();
  }

  matches() {
    const text = this.search.value.trim().toLowerCase(), { store } = this, frame = Math.round(store.time);
    const holds = place => store.word(frame, ...store.places[place])?.toLowerCase().includes(text);
    return text ? [...store.places.keys()].filter(holds) : [];
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
    const { canvas, store } = this;
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
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; store.hover(); });
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
      const spot = this.spot(place);
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
      const [example, position] = store.places[place], cell = store.cell(frame, example, position);
      const away = `${store.arrays.distances[cell].toFixed(1)} word distances from`;
      const edit = this.moves.has(place) && `put here by hand; learned ${away} “${store.words[store.arrays.tokens[cell]]}”`;
      text = `${store.word(frame, example, position)}\nexample ${example + 1}, position ${position} · ` +
        `${store.className(frame, example)}\n${edit || `${away} that word`}`;
    } else {
      const near = this.nearestSpot(spot);
      if (near >= 0) text = store.words[this.words[near]];
    }
    store.hover(...(store.places[place] ?? []));
    this.tip.hidden = !text;
    this.tip.textContent = text;
    const left = spot[0] > this.size[0] - 200;
    this.tip.style.left = left ? "" : `${spot[0] + 14}px`;
    this.tip.style.right = left ? `${this.size[0] - spot[0] + 14}px` : "";
    this.tip.style.top = `${Math.max(0, spot[1] - 10)}px`;
  }

  inside(polygon) {
    return [...this.store.places.keys()].filter(place => {
      const spot = this.spot(place);
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
    const counted = frame in map.preserved ? frame : Math.max(...Object.keys(map.preserved));
    const kept = `At ${store.content.frames[counted]} the map keeps ${percent(map.preserved[counted])} of 10 nearest ` +
      `neighbours (shuffled: ${percent(map.shuffled)}).`;
    const answer = store.ask(["numbers", frame], () => this.count());
    if (this.search.value.trim()) return;
    const own = answer?.reply.own;
    const shares = !answer ? "counting …" : answer.reply.problem ?? (!own ? "needs two examples of a class."
      : `${percent(own.share)} of neighbours in other examples at ${store.content.frames[frame]} ` +
        `(chance ${percent(own.chance)}${own.control === null ? "" : `, each position shifted as far at random ${percent(own.control)}`}).`);
    this.numbers.textContent = `${kept} Own class: ${shares}`;
  }

  close() { this.sizes.disconnect(); cancelAnimationFrame(this.waiting); }
}
