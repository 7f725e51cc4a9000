// A page without a kernel: the widget's model from stored state, and the answers that Python gave before the page was saved.
class StoredModel {
  constructor({ state, answers }) {
    this.state = { ...state, binary: decoded(state.binary) };
    this.answers = answers;
    this.heard = {};
  }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (this.state[name] === value) return;
    this.state[name] = value;
    queueMicrotask(() => this.tell(`change:${name}`));
  }
  save_changes() {}
  on(name, act) { (this.heard[name] ??= []).push(act); }
  off(name, act) { this.heard[name] = (this.heard[name] ?? []).filter(other => other !== act); }
  tell(name, ...values) { for (const act of this.heard[name] ?? []) act(...values); }
  send({ ask }) {
    const key = JSON.stringify(ask), answer = this.answers[key];
    const reply = answer?.reply ?? { problem: "Not stored in this page: open the notebook, where a kernel computes it." };
    queueMicrotask(() => this.tell("msg:custom", { key, reply }, (answer?.buffers ?? []).map(decoded)));
  }
}

const decoded = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
const stored = JSON.parse(document.getElementById("stored").textContent);
render({ model: new StoredModel(stored), el: document.getElementById("lens") });
