// The widget of plane.py: draws what Python computed, and sends back where the points were moved to.
const SIZE = 440, RIGHT = 300, NAMES = ["class 0", "class 1"];

function make(kind, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function html(kind, parent, properties = {}) {
  const node = Object.assign(document.createElement(kind), properties);
  parent.append(node);
  return node;
}

function shape(number, x, y, r) {  // class 0 a circle, class 1 a triangle
  if (number === 0) return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`;
  return `M${x},${y - 1.15 * r}l${1.1 * r},${1.95 * r}h${-2.2 * r}z`;
}

function render({ model, el }) {
  const { classes, line, edge, steps, step_size: sizes } = model.get("looks");
  const unit = SIZE / (2 * edge), px = x => (x + edge) * unit, py = y => (edge - y) * unit;
  const round = value => Math.round(value * 100) / 100;
  const history = [];
  let latest;  // the state that `history` ends with

  const root = html("div", el);
  root.style.cssText = "max-width:760px;font-family:sans-serif;color:var(--jp-ui-font-color1, currentColor)";
  const svg = make("svg", { viewBox: `0 0 ${SIZE + RIGHT} ${SIZE}`, width: "100%", "font-size": 15, fill: "currentColor",
                            role: "group", "aria-label": "The plane: two synthetic points to drag among real points" }, root);
  const id = `plane-${Math.random().toString(36).slice(2)}`;
  make("rect", { width: SIZE, height: SIZE }, make("clipPath", { id }, svg));
  const head = make("marker", { id: `${id}-head`, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 5, markerHeight: 5,
                                orient: "auto-start-reverse" }, svg);
  make("path", { d: "M0,0L8,4L0,8z", fill: "currentColor" }, head);
  make("rect", { width: SIZE, height: SIZE, fill: "none", stroke: "currentColor", "stroke-opacity": 0.5 }, svg);
  const plane = make("g", { "clip-path": `url(#${id})` }, svg);
  for (const [x, y, k] of model.get("real")) {
    make("path", { d: shape(k, px(x), py(y), 3), fill: classes[k], "fill-opacity": 0.5 }, plane);
  }
  const fan = make("g", { stroke: line, "stroke-width": 1.8, "stroke-opacity": 0.8 }, plane);
  const arrows = make("g", { stroke: "currentColor", "stroke-width": 3, "pointer-events": "none" }, svg);
  const handles = NAMES.map((name, k) => {
    const handle = make("g", { tabindex: 0, role: "button", class: `point-${k}` }, svg);
    handle.style.cssText = "cursor:grab;touch-action:none";
    handle.shape = make("path", { fill: classes[k], stroke: line, "stroke-width": 3.5 }, handle);
    return handle;
  });

  const panel = make("g", { transform: `translate(${SIZE + 22} 0)` }, svg);
  make("text", { y: 24 }, panel, "outer loss");
  const loss = make("text", { y: 62, "font-size": 36, class: "loss" }, panel);
  const accuracy = make("text", { y: 92, class: "accuracy" }, panel);
  make("text", { y: 134 }, panel, "the loss since you began");
  make("path", { d: "M0,150v120h215", fill: "none", stroke: "currentColor", "stroke-opacity": 0.5 }, panel);
  const curve = make("polyline", { fill: "none", stroke: line, "stroke-width": 2.5 }, panel);
  const told = [make("text", { y: 306, "font-size": 14 }, panel), make("text", { y: 328, "font-size": 14 }, panel), make("text", { y: 360 }, panel)];
  make("text", { y: 404, "font-size": 14 }, panel, "arrows: against the meta-gradient");
  make("text", { y: 424, "font-size": 14 }, panel, "lines: 12 students after training");

  function send(points) {
    model.set("points", points);
    model.save_changes();
  }

  function moved(k, x, y) {
    const inside = value => Math.min(edge, Math.max(-edge, value));
    send(model.get("points").map((point, i) => i === k ? [inside(x), inside(y)] : point));
  }

  handles.forEach((handle, k) => {
    const follow = event => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      moved(k, at.x / unit - edge, edge - at.y / unit);
    };
    handle.addEventListener("pointerdown", event => {
      event.preventDefault();
      handle.focus();
      handle.setPointerCapture(event.pointerId);
    });
    handle.addEventListener("pointermove", event => handle.hasPointerCapture(event.pointerId) && follow(event));
    handle.addEventListener("keydown", event => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!way) return;
      event.preventDefault();
      event.stopPropagation();  // else the notebook moves to another cell
      const [x, y] = model.get("points")[k], far = event.shiftKey ? 0.25 : 0.05;
      moved(k, x + far * way[0], y + far * way[1]);
    });
  });

  const buttons = html("div", root);
  for (const [text, message] of [["Follow the arrows", { ask: "follow", times: 1 }],
                                 ["Follow them 25 times", { ask: "follow", times: 25 }], ["Start again", { ask: "again" }]]) {
    const button = html("button", buttons, { textContent: text, type: "button" });
    button.style.cssText = "margin:4px 8px 4px 0;padding:4px 10px;font-size:14px";
    button.addEventListener("click", () => model.send(message));
  }
  const controls = html("div", root);
  controls.style.cssText = "display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:2px 16px;font-size:14px";
  function slider(name, least, most, step, get, set) {
    const label = html("label", controls, { textContent: name });
    const input = html("input", label, { type: "range", min: least, max: most, step });
    input.style.cssText = "width:100%;display:block";
    input.setAttribute("aria-label", name);
    input.addEventListener("input", () => set(Number(input.value)));
    return () => { if (input !== document.activeElement || Number(input.value) !== get()) input.value = get(); };
  }
  const sliders = NAMES.flatMap((name, k) => ["across", "up"].map((way, i) => slider(
    `${name}, ${way}`, -edge, edge, 0.05, () => model.get("points")[k][i],
    value => moved(k, ...model.get("points")[k].map((old, j) => j === i ? value : old)))));
  const simple = (name, get, set) => [() => get(model.get(name)), value => { model.set(name, set(value)); model.save_changes(); }];
  sliders.push(slider("step size", Math.log(sizes[0]), Math.log(sizes[1]), 0.01, ...simple("step_size", Math.log, Math.exp)));
  sliders.push(slider("inner steps", 1, steps, 1, ...simple("steps", n => n, n => n)));

  function draw() {
    const state = model.get("state"), points = model.get("points");
    if (state !== latest) history.push(state.loss);
    latest = state;
    if (history.length > 300) history.shift();
    fan.replaceChildren();
    for (const [a, b] of state.fan) {
      const far = 2 * edge / Math.hypot(a, b);
      make("line", { x1: px(-b * far), y1: py(a * far), x2: px(b * far), y2: py(-a * far) }, fan);
    }
    arrows.replaceChildren();
    points.forEach(([x, y], k) => {
      const [gx, gy] = state.gradient[k], size = Math.hypot(gx, gy);
      const long = size > 1e-3 ? Math.min(1.6, 0.5 + 2 * size) / size : 0;  // short ones stay visible, long ones on the plane
      if (long) make("line", { x1: px(x), y1: py(y), x2: px(x - long * gx), y2: py(y - long * gy), class: `arrow-${k}`,
                               "marker-end": `url(#${id}-head)` }, arrows);
      handles[k].shape.setAttribute("d", shape(k, px(x), py(y), 11));
      handles[k].setAttribute("aria-label", `${NAMES[k]} point at ${round(x)}, ${round(y)}; arrow keys move it`);
      told[k].textContent = `class ${k}: (${x.toFixed(2)}, ${y.toFixed(2)}), gradient ${size.toFixed(3)}`;
    });
    told[2].textContent = `${model.get("steps")} steps of size ${model.get("step_size").toFixed(1)}`;
    loss.textContent = state.loss.toFixed(3);
    accuracy.textContent = `${(100 * state.accuracy).toFixed(1)} % of real points right`;
    const top = Math.max(...history), wide = 215 / Math.max(history.length - 1, 20);
    curve.setAttribute("points", history.map((value, i) => `${i * wide},${270 - 115 * value / top}`).join(" "));
    sliders.forEach(update => update());
  }
  const watched = ["points", "step_size", "steps", "state"].map(name => `change:${name}`);
  watched.forEach(name => model.on(name, draw));
  draw();
  return () => watched.forEach(name => model.off(name, draw));
}

export default { render };
