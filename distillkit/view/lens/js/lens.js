// The widget: the bar with film and example, and four panes below it.
const FILM_SECONDS = 6, GLIDE = 350;

class Bar {
  constructor(parent, store) {
    this.store = store;
    const bar = element("div", parent, { className: "dk-bar-top" });
    this.play = button(bar, "▶", "play the film", () => this.toggle());
    this.slider = element("input", bar, { type: "range", min: 0, step: 1 });
    this.slider.setAttribute("aria-label", "frame of the film");
    this.slider.addEventListener("input", () => { this.stop(); store.set({ frame: Number(this.slider.value) }); });
    this.name = element("output", bar);
    this.sets = element("span", bar, { className: "dk-choice dk-sets", role: "group" });
    this.sets.setAttribute("aria-label", "set");
    button(bar, "‹", "previous example", () => store.look(store.get("example") - 1));
    this.examples = element("select", bar);
    this.examples.setAttribute("aria-label", "example");
    this.examples.addEventListener("change", () => store.look(Number(this.examples.value)));
    button(bar, "›", "next example", () => store.look(store.get("example") + 1));
    store.listen(kind => {
      if (kind === CONTENT || (kind === REST && store.content.choices)) this.fill();
      if (kind === LOOK) this.glide();
      if (kind !== THEME) this.draw();
    });
    this.fill();
    this.draw();
  }

  fill() {
    const { store } = this, { choices, frames } = store.content, frame = Math.round(store.time);
    this.slider.max = store.frames - 1;
    this.slider.hidden = this.name.hidden = choices;
    this.sets.replaceChildren();
    if (choices) frames.forEach((name, number) => {
      button(this.sets, name, `show the set ${name}`, () => { this.stop(); store.set({ frame: number }); });
    });
    this.examples.replaceChildren();
    const count = store.count(frame);
    for (let example = 0; example < store.examples; example++) {
      const text = example < count ? `example ${example + 1} of ${count}: ${store.className(frame, example)}`
        : `example ${example + 1}: not in this set`;
      element("option", this.examples, { value: example, disabled: example >= count }, text);
    }
    this.slider.disabled = this.play.disabled = store.frames < 2;
  }

  draw() {
    const { store } = this, frame = Math.round(store.time);
    this.slider.value = frame;
    this.name.textContent = store.content.frames[frame];
    this.slider.setAttribute("aria-valuetext", store.content.frames[frame]);
    [...this.sets.children].forEach((node, number) => node.setAttribute("aria-pressed", number === frame));
    this.examples.value = store.get("example");
    this.play.textContent = this.playing ? "❚❚" : "▶";
  }

  // Move to the frame of the model: at once for who asked the system for less motion.
  glide() {
    const { store } = this, to = store.get("frame"), from = store.time;
    if (this.playing || from === to) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches, begun = performance.now();
    cancelAnimationFrame(this.moving);
    const step = now => {
      const share = still ? 1 : clamp((now - begun) / GLIDE, 0, 1);
      store.time = from + (to - from) * share * (2 - share);
      if (share === 1) store.time = to;
      store.tell(share === 1 ? REST : TIME);
      if (share < 1) this.moving = requestAnimationFrame(step);
    };
    this.moving = requestAnimationFrame(step);
  }

  toggle() {
    if (this.playing) { this.stop(); return; }
    const { store } = this, last = store.frames - 1;
    cancelAnimationFrame(this.moving);
    let time = store.time >= last ? 0 : store.time, before = performance.now();
    this.playing = true;
    const step = now => {
      if (!this.playing) return;
      time = Math.min(last, time + (now - before) / 1000 * Math.max(2, last / FILM_SECONDS));
      before = now;
      store.time = time;
      if (time >= last) { this.stop(); return; }
      store.tell(TIME);
      this.moving = requestAnimationFrame(step);
    };
    this.moving = requestAnimationFrame(step);
  }

  // At rest on a frame; Python hears of it only now.
  stop() {
    cancelAnimationFrame(this.moving);
    if (!this.playing) return;
    this.playing = false;
    this.store.time = Math.round(this.store.time);
    this.store.set({ frame: this.store.time });
    this.store.tell(REST);
  }

  close() { this.playing = false; cancelAnimationFrame(this.moving); }
}

// A running distillation: its loss, the time left, and a button that stops it.
class LiveBar {
  constructor(parent, store) {
    this.store = store;
    this.bar = element("div", parent, { className: "dk-bar-top dk-live", hidden: true });
    this.stop = button(this.bar, "■ stop", "stop after this step, with a checkpoint", () => store.order(["stop"]));
    this.status = element("span", this.bar, { role: "status" });
    this.curve = element("canvas", this.bar);
    store.listen(kind => { if (kind === LIVE || kind === THEME) this.draw(); });
    this.draw();
  }

  draw() {
    const { status, losses = [], steps, ended } = this.store.get("live");
    this.bar.hidden = !status;
    if (!status) return;
    this.status.textContent = status;
    this.stop.disabled = ended;
    const width = 220, height = 34, pen = fitted(this.curve, width, height);
    const least = Math.min(...losses), span = Math.max(1e-9, Math.max(...losses) - least);
    this.curve.setAttribute("role", "img");
    const range = `from ${least.toFixed(3)} to ${(least + span).toFixed(3)}`;
    this.curve.setAttribute("aria-label", `outer loss of ${losses.length} steps, ${range}`);
    this.curve.title = `outer loss ${range}`;
    pen.strokeStyle = this.store.content.colours.learned;
    pen.lineWidth = 1.5;
    pen.beginPath();
    const x = step => step / Math.max(1, steps - 1) * width, y = loss => 3 + (height - 6) * (1 - (loss - least) / span);
    losses.forEach((loss, step) => pen.lineTo(x(step), y(loss)));
    pen.stroke();
  }
}

// Dark or light, as the text of the page says; frameworks differ in everything else. Not known before the root is in the page.
function shade(root) {
  const [r, g, b] = (getComputedStyle(root).color.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number);
  const dark = (0.3 * r + 0.6 * g + 0.1 * b) > 140;
  const changed = root.classList.contains("dk-dark") !== dark;
  root.classList.toggle("dk-dark", dark);
  return changed;
}

function render({ model, el }) {
  const root = element("div", el, { className: "dk-lens" });
  shade(root);
  const store = new Store(model);
  const bar = new Bar(root, store);
  new LiveBar(root, store);
  const grid = element("div", root, { className: "dk-grid" });
  const panes = [MapPane, HeadsPane, TokensPane, WorkbenchPane].map(Pane => new Pane(grid, store));
  panes[0].count();
  const look = () => { if (shade(root)) store.tell(THEME); };
  const theme = new MutationObserver(look);
  theme.observe(document.body, { attributes: true });
  const placed = new ResizeObserver(look);
  placed.observe(root);
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", look);
  return () => {
    theme.disconnect();
    placed.disconnect();
    system.removeEventListener("change", look);
    bar.close();
    for (const part of panes) part.close?.();
    store.close();
  };
}

export default { render };
