// Workbench: words for the position that is looked at, each with its loss; click one to put it there, undo, and the label.
class WorkbenchPane {
  constructor(parent, store) {
    this.store = store;
    const { head, body } = pane(parent, "workbench", "Workbench");
    this.where = element("span", head, { className: "dk-where", role: "status" });
    this.undo = button(head, "undo", "take the last edit back", () => store.order(["undo"]));
    this.text = element("input", head, { type: "text", placeholder: "try a word", size: 12 });
    this.text.setAttribute("aria-label", "a word of your own, judged beside the nearest ones");
    this.text.addEventListener("change", () => this.draw());
    this.words = element("div", body, { className: "dk-words" });
    this.label = element("div", body, { className: "dk-label" });
    this.changed = element("p", body, { className: "dk-numbers" });
    store.listen(kind => { if (!UNCHANGED.includes(kind)) this.draw(); });
    this.draw();
  }

  draw() {
    const { store, words } = this, [frame, example, position] = ["frame", "example", "position"].map(name => store.get(name));
    const edits = store.get("edits"), edited = edits[0]?.frame;
    this.undo.disabled = !edits.length;
    this.changed.textContent = edits.length ? `${edits.length} edits of ${store.content.frames[edited]}: ` +
      edits.map(e => `example ${e.example + 1}, position ${e.position} → ${e.word}`).join("; ") + ". In Python: lens.edited" : "";
    this.where.textContent = `example ${example + 1}, position ${position}: ` +
      `nearest “${store.word(frame, example, position) ?? "∅"}”, real “${store.realWord(example, position) ?? "∅"}”`;
    this.drawLabel(frame, example);
    words.replaceChildren();
    if (edits.length && edited !== frame) {
      element("p", words, {}, `The workbench holds edits of ${store.content.frames[edited]}.`);
      button(words, "go there", "show the edited frame", () => store.set({ frame: edited }));
      return;
    }
    if (store.word(frame, example, position) === null || store.placeAt[store.cell(0, example, position)] < 0) {
      element("p", words, {}, "This position is fixed, or not in this set; choose a word above.");
      return;
    }
    const note = element("p", words, {}, "finding the nearest words …");
    const answer = store.ask(["candidates", store.get("revision"), frame, example, position, this.text.value.trim()],
      () => this.draw(), share => { note.textContent = `judging the words: ${percent(share)}`; });
    if (!answer) return;
    if (answer.reply.problem) { note.textContent = answer.reply.problem; return; }
    note.remove();
    this.drawWords(answer.reply.rows, frame, example, position);
  }

  drawWords(rows, frame, example, position) {
    const judged = rows.filter(row => row.loss !== undefined), lowest = Math.min(...judged.map(row => row.loss));
    const most = Math.max(1e-9, ...judged.map(row => Math.abs(row.change)));
    for (const row of rows) {
      const node = element("button", this.words, { type: "button", className: "dk-candidate" });
      node.dataset.token = row.token;
      element("b", node, { dir: "auto" }, row.word);
      element("small", node, {}, `${row.distance.toFixed(2)} away`);
      if (row.loss !== undefined) {
        element("small", node, {}, `loss ${row.loss.toFixed(4)} (${signed(row.change, 4)})`);
        const bar = element("i", node, { className: "dk-bar" });
        bar.style.width = `${50 * Math.abs(row.change) / most}%`;
        bar.style.background = rgba(row.change < 0 ? MORE : LESS, 0.9);
        bar.style.marginLeft = row.change < 0 ? `${50 - 50 * Math.abs(row.change) / most}%` : "50%";
        if (row.loss === lowest) node.classList.add("dk-lowest");
      }
      node.title = `put “${row.word}” at position ${position}`;
      node.addEventListener("click", () => this.store.order(["accept", frame, example, position, row.token],
        ({ reply }) => { if (reply.problem) this.changed.textContent = reply.problem; }));
    }
    const legend = judged.length
      ? "Distances in word distances. Bars: the loss falls (blue, left) or rises (orange, right) with the word."
      : "Distances in word distances. Losses need Lens(…, judge=…).";
    element("p", this.words, { className: "dk-hint" }, legend);
  }

  // The soft label as bars; beside it, when asked for, what a student trained on the set says before and after the edits.
  drawLabel(frame, example) {
    const { store, label } = this, { classes, probabilities, classifies, frames } = store.content;
    const shares = probabilities[frame]?.[example];
    label.replaceChildren();
    const head = element("header", label);
    element("h4", head, {}, shares ? "label of the example" : "response of the example");
    if (!shares) { element("p", label, { dir: "auto" }, store.className(frame, example)); return; }
    const note = document.createElement("p"), columns = [["label", shares]];
    if (classifies) {
      const ask = button(head, "ask a student", "train a student on this set, and show what it says of the example",
        () => { this.asking = !this.asking; this.draw(); });
      ask.setAttribute("aria-pressed", Boolean(this.asking));
    }
    if (classifies && this.asking) {
      note.textContent = "training a student …";
      const answer = store.ask(["prediction", store.get("revision"), frame, example], () => this.draw(),
        share => { note.textContent = `training a student: ${percent(share)}`; });
      if (answer?.reply.problem) note.textContent = answer.reply.problem;
      else if (answer) {
        const { recipe, before, after } = answer.reply;
        columns.push(["student", before]);
        if (after) columns.push(["after edit", after]);
        note.textContent = `Student: trained on “${frames[frame]}”${after ? " before the edit" : ""}, ${recipe} recipe.`;
      }
    }
    const table = element("div", label, { className: "dk-shares", role: "table" });
    table.style.gridTemplateColumns = `minmax(60px, 1.2fr) repeat(${columns.length}, minmax(0, 1fr))`;
    const row = () => element("div", table, { role: "row" });
    if (columns.length > 1) {
      const names = row();
      for (const name of ["", ...columns.map(([name]) => name)]) element("small", names, { role: "columnheader" }, name);
    }
    const most = number => Math.max(...columns.map(([, values]) => values[number]));
    [...shares.keys()].sort((a, b) => most(b) - most(a)).slice(0, 8).forEach(number => {
      const cells = row();
      element("span", cells, { dir: "auto", role: "rowheader", title: classes[number] }, classes[number]);
      for (const [, values] of columns) {
        const cell = element("span", cells, { className: "dk-track", role: "cell" });
        const bar = element("i", cell);
        bar.style.width = `${100 * values[number]}%`;
        bar.style.background = store.colour(number);
        element("b", cell, {}, `${Math.round(100 * values[number])} %`);
      }
    });
    label.append(note);
    note.className = "dk-numbers";
  }
}
