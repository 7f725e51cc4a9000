// What is looked at, shared by all panes: the model of the widget, its arrays, and answers from Python, each asked for once.
const TYPES = { int32: Int32Array, float32: Float32Array, uint16: Uint16Array, uint8: Uint8Array };
const bytesOf = view => view instanceof ArrayBuffer ? view
  : view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);  // a view may be unaligned, or larger than its part

class Store {
  constructor(model) {
    this.model = model;
    this.listeners = [];
    this.answers = new Map();
    this.time = model.get("frame");  // between two frames while the film plays
    this.decode();
    this.over = null;  // the example and position under the pointer, in whichever pane
    this.ends = [];
    const on = (name, act) => { model.on(name, act); this.ends.push(() => model.off(name, act)); };
    for (const name of ["frame", "example", "position"]) on(`change:${name}`, () => this.tell(LOOK));
    on("change:selection", () => this.tell(SELECTION));
    on("change:revision", () => this.tell(EDITS));
    on("change:live", () => this.tell(LIVE));
    on("change:binary", () => {
      const first = this.content.frames[0];
      this.decode();
      if (this.content.frames[0] !== first) this.answers.clear();  // another film
      this.tell(CONTENT);
    });
    on("msg:custom", (message, buffers) => this.receive(message, buffers));
  }

  close() { for (const end of this.ends) end(); this.listeners = []; }

  decode() {
    this.content = this.model.get("content");
    const buffer = bytesOf(this.model.get("binary"));
    this.arrays = {};
    for (const [name, [type, shape, start]] of Object.entries(this.content.arrays)) {
      const size = shape.reduce((product, length) => product * length, 1);
      this.arrays[name] = Object.assign(new TYPES[type](buffer, start, size), { shape });
    }
    this.words = this.content.words.split("\n");
    [this.frames, this.examples, this.length] = this.arrays.tokens.shape;
    this.places = [];
    this.placeAt = new Int32Array(this.examples * this.length).fill(-1);
    this.arrays.learned.forEach((learned, cell) => {
      if (!learned) return;
      this.placeAt[cell] = this.places.length;
      this.places.push([Math.floor(cell / this.length), cell % this.length]);
    });
  }

  get(name) { return this.model.get(name); }

  set(changes) {
    for (const [name, value] of Object.entries(changes)) this.model.set(name, value);
    this.model.save_changes();
  }

  listen(act) { this.listeners.push(act); }

  tell(kind) { for (const act of this.listeners) act(kind); }

  look(example, position) {
    if (position === undefined) position = this.places.find(([e]) => e === example)?.[1] ?? 0;
    this.set({ example: clamp(example, 0, this.count(this.get("frame")) - 1), position });
  }

  hover(...over) {
    if (String(over) === String(this.over ?? [])) return;
    this.over = over.length ? over : null;
    this.tell(OVER);
  }

  colour(label) {
    const { classes } = this.content.colours;
    return classes[label % classes.length];
  }

  // The number of a class, -1 for an example that the frame lacks; and its name.
  label(frame, example) { return this.arrays.labels[frame * this.examples + example]; }

  // How many examples a frame has.
  count(frame) { return this.arrays.labels.subarray(frame * this.examples, (frame + 1) * this.examples).filter(l => l >= 0).length; }

  className(frame, example) { return this.content.classes[this.label(frame, example)] ?? ""; }

  cell(frame, example, position) { return (frame * this.examples + example) * this.length + position; }

  edit(frame, example, position) {
    return this.get("edits").findLast(e => e.frame === frame && e.example === example && e.position === position);
  }

  word(frame, example, position) {
    const edited = this.edit(frame, example, position);
    const index = this.arrays.tokens[this.cell(frame, example, position)];
    return edited ? edited.word : index < 0 ? null : this.words[index];
  }

  realWord(example, position) {
    const [examples, length] = this.arrays.real.shape;
    const index = example < examples && position < length ? this.arrays.real[example * length + position] : -1;
    return index < 0 ? null : this.words[index];
  }

  // The answer to a question, or null while it is computed; `then` is called as soon as it is there, `done` on the way.
  ask(question, then, done = () => {}) {
    const key = JSON.stringify(question), answer = this.answers.get(key);
    if (answer?.reply) return answer;
    if (answer) { answer.waiting.push([then, done]); return null; }
    this.answers.set(key, { waiting: [[then, done]] });
    this.model.send({ ask: question });
    return null;
  }

  // A change that Python makes: its outcome is a change of the model, or a problem to show.
  order(question, then = () => {}) {
    this.answers.delete(JSON.stringify(question));
    this.ask(question, answer => { this.answers.delete(JSON.stringify(question)); then(answer); });
  }

  receive(message, buffers) {
    const answer = this.answers.get(message.key);
    if (!answer || answer.reply) return;
    if (message.reply === undefined) { for (const [, done] of answer.waiting) done(message.done); return; }
    const { waiting } = answer;
    Object.assign(answer, { reply: message.reply, buffers: (buffers ?? []).map(bytesOf), waiting: [] });
    for (const [then] of waiting) then(answer);
  }
}
