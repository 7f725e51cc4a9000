// Helpers that all panes share. Text of a corpus reaches the page by textContent and fillText only.
const MORE = [1, 115, 178], LESS = [222, 143, 5];  // above and below zero: two colours that every eye tells apart
// What a pane hears of: rest (the film stands still), look (what is looked at), time (between frames), and so on.
const REST = "rest", LOOK = "look", TIME = "time", SELECTION = "selection";
const EDITS = "edits", CONTENT = "content", THEME = "theme", LIVE = "live", OVER = "over";
const UNCHANGED = [TIME, SELECTION, LIVE, OVER];  // for panes that show one example at rest

function element(kind, parent, properties = {}, text) {
  const node = document.createElement(kind);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && name !== "list") node[name] = value; else node.setAttribute(name, value);
  }
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function button(parent, text, label, act) {
  const node = element("button", parent, { type: "button", title: label }, text);
  node.setAttribute("aria-label", label);
  node.addEventListener("click", act);
  return node;
}

function pane(parent, name, title) {
  const section = element("section", parent, { className: `dk-pane dk-${name}` });
  section.setAttribute("aria-label", title);
  const head = element("header", section);
  element("h3", head, {}, title);
  return { section, head, body: element("div", section, { className: "dk-body" }) };
}

const clamp = (value, least, most) => Math.min(most, Math.max(least, value));
const percent = share => share === null || share === undefined ? "–"
  : share > 0 && share < 0.01 ? `${(100 * share).toFixed(2)} %` : `${Math.round(100 * share)} %`;
const signed = (value, digits = 3) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(value).toFixed(digits)}`;
const rgba = ([r, g, b], alpha) => `rgba(${r},${g},${b},${alpha})`;
const ofNode = (node, name) => getComputedStyle(node).getPropertyValue(name).trim();

// From -1 to 1: white at zero, one colour on each side.
function diverging(share) {
  const [r, g, b] = share > 0 ? MORE : LESS, part = clamp(Math.abs(share), 0, 1);
  return [255 + (r - 255) * part, 255 + (g - 255) * part, 255 + (b - 255) * part];
}

// An empty canvas that is as sharp as the screen, drawn in the units of the page.
function fitted(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
  const size = [width, height].map(length => Math.max(1, Math.round(length * ratio)));
  if (canvas.width !== size[0] || canvas.height !== size[1]) {  // else it would be allocated for each moment of the film
    [canvas.width, canvas.height] = size;
    canvas.style.height = `${height}px`;
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}
