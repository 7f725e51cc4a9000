"""The widget: state that the front end draws, and answers to what it asks.

State goes over once, as JSON and one buffer.  What costs a forward pass (attention, losses) or minutes (UMAP) is computed
when the front end asks for it, sent as bytes, and remembered under the question, so that a page without a kernel can answer
the same questions from what was asked before.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import anywidget
import numpy as np
import pandas
import traitlets
from matplotlib.figure import Figure

from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.student import Params, Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_is, check_whole, require
from distillkit.io.escaping import one_line
from distillkit.view.lens import page, panes, still
from distillkit.view.lens.content import contents, tokens_of
from distillkit.view.lens.film import ABSENT, Film, filmed, frames_in, record_film
from distillkit.view.lens.live import Run
from distillkit.view.lens.maps import make_map, own_class
from distillkit.view.lens.reading import room, stretches, words
from distillkit.view.lens.wire import script, style

SHOWN = 2.0  # seconds between two growths of the film of a running distillation, at least
STATE = ("content", "binary", "frame", "example", "position", "selection", "edits", "revision", "live")


class Lens(anywidget.AnyWidget):
    """Four linked panes and a slider over the frames of a film: map, tokens, attention heads, and a workbench.

    Args:
        history: the folder of :func:`~distillkit.view.lens.film.record_film`; a set; several sets to compare, by name, such as
            ``{"random": a, "distilled": b, "as text": c}``, of any sizes and with classes in any order; or a Distiller that
            :meth:`run` is to run.  All in one embedding space.
        student: the model in whose embedding space they are, an encoder or a decoder.
        real: real text to compare with, example by example; default: the training rows that the set was taken from, if
            ``task`` is there, else the first frame.
        task: whose training text is marked on the map.
        judge: gives candidates and positions their losses, such as :class:`~distillkit.text.judges.FrozenJudge`.
        params: weights of the student for attention, as :meth:`Student.init` returns them; default: those it was loaded with.
        reader: another model, for text that is to move to it: its tokens stand below those of the set, with what it cuts
            differently, does not know, or (with ``task``) has no room for.
        picture: which of the panes ``map``, ``tokens`` and ``heads`` are on paper, where no kernel runs; the widget has all.

    Attributes:
        frame, example, position: what is looked at; set one, and the front end follows.
        selection: indices of the positions that are selected on the map, into ``film.places``.
        edited: the set as the workbench has changed it; the frame that is looked at before the first change.

    Raises:
        ValueError: sets of another embedding table, nothing to look at, or an unknown pane.
    """

    _css = style()
    content = traitlets.Dict().tag(sync=True)
    binary = traitlets.Bytes().tag(sync=True)
    frame = traitlets.Int(0).tag(sync=True)
    example = traitlets.Int(0).tag(sync=True)
    position = traitlets.Int(0).tag(sync=True)
    selection = traitlets.List(traitlets.Int()).tag(sync=True)
    edits = traitlets.List().tag(sync=True)
    revision = traitlets.Int(0).tag(sync=True)
    live = traitlets.Dict().tag(sync=True)

    def __init__(self, history, student: Student, *, real: DistilledSet | None = None, task: Task | None = None, judge=None,
                 params: Params | None = None, reader: Student | None = None, picture: Sequence[str] = still.PANES):
        self.distiller = history if isinstance(history, Distiller) else None
        film = filmed(history, student)
        for name, value, kind in (("task", task, Task), ("reader", reader, Student), ("real", real, DistilledSet)):
            if value is not None:
                check_is(name, value, kind)
        self.student, self.task, self.judge, self.params, self.reader = student, task, judge, params, reader
        self.picture = still.checked(picture)
        self._take(film, real)
        self._trained: tuple[DistilledSet, Params, str] | None = None  # the set last trained on, parameters, recipe
        self._real = real
        self._states: list[DistilledSet] = []  # the frame that is edited, then the set after each edit
        self._turns = 0
        self._run: Run | None = None
        first = self.film.places[0] if len(self.film.places) else (0, 0)
        content, binary = self._content()
        super().__init__(_esm=script(), content=content, binary=binary, frame=len(self.film.sets) - 1,
                         example=int(first[0]), position=int(first[1]))
        self.on_msg(self._receive)

    def __repr__(self) -> str:
        frames, (examples, length) = len(self.film.sets), self.film.learned.shape
        return f"Lens: {frames} frames of {examples} examples with {length} positions"

    def _take(self, film: Film, real: DistilledSet | None) -> None:
        self.film = film
        self.real = panes.real_text(film.sets[0], self.task, self.student) if real is None else real
        self.real.check_table(self.student)
        self.maps = {"pca": make_map(film, self.student, "pca", real=self.real)}
        self._answers: dict[str, tuple[dict, list[bytes]]] = {}

    @traitlets.validate("frame", "example", "position")
    def _within(self, proposal) -> int:
        sizes = dict(zip(("frame", "example", "position"), self.film.tokens.shape))
        return min(max(proposal["value"], 0), sizes[proposal["trait"].name] - 1)

    def _content(self) -> tuple[dict, bytes]:
        return contents(self.film, self.maps, self.real, self.student, self.task, judge=self.judge, reader=self.reader)

    # What the front end asks

    def _receive(self, _, message: dict, buffers) -> None:
        ask = message.get("ask")
        key = json.dumps(ask, separators=(",", ":"))
        try:
            reply, parts = self.answer(ask, tell=lambda share: self.send({"key": key, "done": share}))
        except Exception as error:  # a traceback would be lost in the log of the front end
            reply, parts = {"problem": one_line(str(error))}, []
        self.send({"key": key, "reply": reply}, parts)

    def answer(self, ask: list, tell: panes.Tell | None = None) -> tuple[dict, list[bytes]]:
        """What the front end is told: JSON and buffers.

        Args:
            ask: what, then its arguments, whole numbers or text: ``["attention", revision, frame, example]``,
                ``["candidates", revision, frame, example, position, text]``, ``["values", revision, frame, example]``,
                ``["reading", revision, frame, example]``, ``["prediction", revision, frame, example]``, ``["numbers", frame]``,
                ``["map", method]``, ``["place", method, token]``, ``["accept", frame, example, position, token]``,
                ``["undo"]``, ``["stop"]``.
            tell: called with the share that is done.

        Raises:
            ValueError: a question that is none.
        """
        require(isinstance(ask, list) and ask and ask[0] in ASKS,
                f"Lens has no answer to {ask!r}; ask one of {', '.join(ASKS)}")
        kind, *arguments = ask
        if kind in ("accept", "undo", "stop"):
            return getattr(self, f"_{kind}")(*arguments), []
        key = json.dumps(ask, separators=(",", ":"))
        if key not in self._answers:
            if kind in ("attention", "candidates", "values", "reading", "prediction"):
                require(arguments.pop(0) == self.revision, "the set has changed meanwhile")
            self._answers[key] = getattr(self, f"_{kind}")(*arguments, **({"tell": tell} if kind in TELLING else {}))
        return self._answers[key]

    def _state(self, frame: int) -> DistilledSet:
        """A frame, or the edited set in its place."""
        return self._states[-1] if self.edits and self.edits[0]["frame"] == frame else self.film.sets[frame]

    def _attention(self, frame: int, example: int) -> tuple[dict, list[bytes]]:
        pair = [panes.one_example(self._state(frame), example)]
        if example < len(self.real):
            pair.insert(0, panes.one_example(self.real, example))
        weights = panes.heads(self.student, pair, self.params)
        return {"shape": list(weights.shape)}, [weights.tobytes()]

    def _candidates(self, frame: int, example: int, position: int, text: str, tell=None) -> tuple[dict, list[bytes]]:
        more = self.student.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        table = panes.candidates(self._state(frame), self.student, example, position, more=more, judge=self.judge, tell=tell)
        table["distance"] /= self.film.yardstick
        return {"rows": table.to_dict("records")}, []

    def _values(self, frame: int, example: int, tell=None) -> tuple[dict, list[bytes]]:
        require(self.judge is not None, "training values need a judge: Lens(…, judge=dk.FrozenJudge(task, student))")
        values = panes.training_values(self._state(frame), example, self.judge, tell)
        return {"values": [None if np.isnan(value) else float(value) for value in values]}, []

    def _tokens(self, frame: int, example: int) -> np.ndarray:
        """The token of each position, edits included."""
        tokens = self.film.tokens[frame, example].copy()
        for edit in self.edits:
            if (edit["frame"], edit["example"]) == (frame, example):
                tokens[edit["position"]] = edit["token"]
        return tokens

    def _reading(self, frame: int, example: int) -> tuple[dict, list[bytes]]:
        task, reader, tokens = self.task, self.reader, self._tokens(frame, example)
        require(reader is not None, "another tokenizer's tokens need its model: Lens(…, reader=dk.load_student(…))")
        names, labels, _ = panes.labels_of(self.film.sets[frame])
        limit = task and (lambda text: room(text, [*task.classes, names[labels[example]]][0], task, reader))
        return {"stretches": stretches(self.student.tokenizer, tokens, reader.tokenizer, limit)}, []

    def _prediction(self, frame: int, example: int, tell=None) -> tuple[dict, list[bytes]]:
        """What a student trained on the frame, without edits, says of an example before and after the edits."""
        before, after = self.film.sets[frame], self._state(frame)
        if self._trained is None or self._trained[0] is not before:
            self._trained = before, *panes.trained(before, self.student, self.task, tell)
        _, params, recipe = self._trained
        names, _, _ = panes.common_labels(self.film.sets)
        shares = [panes.predicted(self.student, params, state, example) for state in (before, after)]
        rows = [[one.get(name, 0.0) for name in names] for one in shares]
        return {"recipe": recipe, "before": rows[0], "after": rows[1] if after is not before else None}, []

    def _numbers(self, frame: int) -> tuple[dict, list[bytes]]:
        shares = own_class(self.film, frame, panes.labels_of(self.film.sets[frame])[1])
        return {"own": shares and {name: None if np.isnan(value) else value for name, value in shares.items()}}, []

    def _place(self, method: str, token: int) -> tuple[dict, list[bytes]]:
        return {"at": self.maps[method].at(token, self.student).tolist()}, []

    def _map(self, method: str) -> tuple[dict, list[bytes]]:
        if method not in self.maps:
            self.maps[method] = make_map(self.film, self.student, method, real=self.real)
            with self.hold_sync():
                self.content, self.binary = self._content()
        return {"method": method}, []

    # A running distillation

    def run(self, steps: int, *, folder: str | Path | None = None, frames: int = 41) -> asyncio.Task:
        """Run the distillation in the background and follow it: loss, time left, and the film as it grows.

        Args:
            steps: in all, as :meth:`Distiller.run` counts them.
            folder: keep the frames there (:func:`~distillkit.view.lens.film.record_film`); those of an earlier part are shown.
            frames: how many states of the whole run to keep.

        Returns:
            a task to await, for a cell that needs the finished set.

        Raises:
            ValueError: Lens was not made of a Distiller, or of one without ``checkpoint``.
            RuntimeError: no event loop is running, as in a script; there ``distiller.run`` does the same.
        """
        distiller = self.distiller
        require(distiller is not None, "there is nothing to run: give Lens a Distiller in the place of the history")
        assert distiller is not None
        check_whole("frames", frames, least=2)
        records = distiller.run(steps) if folder is None else record_film(distiller, folder, steps, frames=frames)
        if folder is not None and frames_in(folder):
            self._take(filmed(folder, self.student), self._real)
            self.content, self.binary = self._content()
        shown = {round(step) for step in np.linspace(0, steps, frames)}
        grown = [time.monotonic()]
        waiting: dict[str, DistilledSet] = {}

        def show(status: str, ended: bool) -> None:
            losses = [record.loss for record in distiller.records]
            self.live = {"status": one_line(status), "losses": losses, "steps": steps, "ended": ended}
            name = f"step {distiller.step}"
            if (distiller.step in shown or ended) and name not in self.film.names:
                waiting[name] = distiller.distilled
            if waiting and (ended or time.monotonic() - grown[0] > SHOWN):
                self._grow(waiting)
                waiting.clear()
                grown[0] = time.monotonic()

        self._run = Run(distiller, steps, records, show)
        return self._run.task

    def _grow(self, states: dict[str, DistilledSet]) -> None:
        """Add frames to the film; whoever looks at the last one goes on to the new last one."""
        at_the_end = self.frame == len(self.film.sets) - 1
        for name, state in states.items():
            self.film = self.film.with_frame(name, state, self.student)
        self.maps = {method: flat.with_frames(self.film) for method, flat in self.maps.items()}
        with self.hold_sync():
            self.content, self.binary = self._content()
            if at_the_end:
                self.frame = len(self.film.sets) - 1

    def stop(self) -> None:
        """End the run after its step, with a checkpoint; nothing where none is running."""
        if self._run is not None:
            self._run.stopping = True

    def _stop(self) -> dict:
        self.stop()
        return {}

    # The workbench

    def _accept(self, frame: int, example: int, position: int, token: int) -> dict:
        self.accept(token, frame=frame, example=example, position=position)
        return {}

    def accept(self, token: int, *, frame: int | None = None, example: int | None = None, position: int | None = None) -> None:
        """Put the word ``token`` at a position; by default at the one that is looked at.

        Raises:
            ValueError: a position that is not learned, or edits of another frame that are not undone.
        """
        frame, example, position = (getattr(self, name) if value is None else value for name, value in
                                    (("frame", frame), ("example", example), ("position", position)))
        require(not self.edits or self.edits[0]["frame"] == frame,
                f"the workbench holds edits of frame {self.edits and self.edits[0]['frame']}; go there, or undo them first")
        state = self._state(frame)
        after = panes.replaced(state, self.student, example, position, token)
        word = words(self.student.tokenizer, [token])[0]
        self._states = [*(self._states or [state]), after]
        self._turns += 1
        edit = {"frame": frame, "example": example, "position": position, "token": token, "word": word}
        with self.hold_sync():
            self.edits, self.revision = [*self.edits, edit], self._turns

    def _undo(self) -> dict:
        self.undo()
        return {}

    def undo(self) -> None:
        """Take the last edit back; does nothing where there is none."""
        if self.edits:
            self._states, self._turns = self._states[:-1], self._turns + 1
            with self.hold_sync():
                self.edits, self.revision = self.edits[:-1], self._turns if len(self.edits) > 1 else 0
            if not self.edits:
                self._states = []

    # Without a kernel

    def _repr_mimebundle_(self, **options):
        """The widget, and a picture for where there is none."""
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return (data or {}) | {"image/png": self.figure()._repr_png_()}, metadata

    def _drawn(self, method: str = "pca") -> tuple:
        """What both pictures need: film, map, classes, and the nearest words of the learned positions in each frame."""
        if method not in self.maps:
            self.answer(["map", method])
        names, labels, _ = panes.common_labels(self.film.sets)
        nearest = [words(self.student.tokenizer, tokens[self.film.learned]) for tokens in self.film.tokens]
        return self.film, self.maps[method], names, labels, nearest

    def figure(self, method: str = "pca", *, picture: Sequence[str] | None = None) -> Figure:
        """What is looked at, on paper: film strip, words of the example, and attention heads, or the tokens of ``reader``.

        Args:
            method: of the map, ``"pca"`` or ``"umap"``, which takes half a minute.
            picture: the panes, as the widget takes them; default: its own.
        """
        picture = self.picture if picture is None else still.checked(picture)
        frame = self.frame
        example = min(self.example, len(self.film.sets[frame]) - 1)  # a smaller set may lack the one that is looked at
        difference = None
        if "heads" in picture:
            reply, buffers = self.answer(["attention", self.revision, frame, example])
            weights = np.frombuffer(buffers[0], np.uint8).reshape(reply["shape"]) / panes.LEVELS
            difference = weights[1] - weights[0] if len(weights) > 1 else None
        reading = self.answer(["reading", self.revision, frame, example])[0]["stretches"] if self.reader else None
        real = np.full(self.film.tokens.shape[2], ABSENT)
        if example < len(self.real):
            row = tokens_of(self.real, self.film)[example, : len(real)]
            real[: len(row)] = row
        real, chips = (words(self.student.tokenizer, tokens) for tokens in (real, self._tokens(frame, example)))
        return still.still(*self._drawn(method), example=example, frame=frame, real=real, chips=chips, reading=reading,
                           reader=self.reader and self.reader.name, picture=picture, difference=difference)

    def save_gif(self, path: str | Path) -> Path:
        """Write the film of the map as a GIF, and return where it is."""
        return still.save_gif(path, *self._drawn(), example=self.example)

    def save_html(self, path: str | Path) -> Path:
        """Write one self-contained page, and return where it is.

        It holds the film, the attention in every example of the frame that is looked at (of a few sets with names: of each),
        and whatever was asked for before (candidates, training values, UMAP); a page cannot compute more.
        """
        for frame, state in enumerate(self.film.sets):
            self.answer(["numbers", frame])
            for example in range(len(state)):
                if frame == self.frame or self.film.choices:
                    self.answer(["attention", self.revision, frame, example])
                if self._trained is not None and self._trained[0] is state:
                    self.answer(["prediction", self.revision, frame, example])
                if self.reader is not None:
                    self.answer(["reading", self.revision, frame, example])
        for method in self.maps:
            for edit in self.edits:
                self.answer(["place", method, edit["token"]])
        state = {name: getattr(self, name) for name in STATE}
        return page.save(path, page.page(repr(self), state, self._answers, script("page"), self._css))

    @property
    def edited(self) -> DistilledSet:
        """The set after all edits."""
        return self._states[-1] if self._states else self.film.sets[self.frame]

    @property
    def selected(self) -> pandas.DataFrame:
        """The selected positions, a row each: ``example``, ``position``, nearest ``word``, and ``distance`` to it in units of
        the distance between neighbouring words."""
        places = self.film.places[[index for index in self.selection if 0 <= index < len(self.film.places)]]
        example, position = places[:, 0], places[:, 1]
        nearest = words(self.student.tokenizer, self.film.tokens[self.frame, example, position])
        return pandas.DataFrame({"example": example, "position": position, "word": nearest,
                                 "distance": self.film.distances[self.frame, example, position]})


ASKS = ("attention", "candidates", "values", "reading", "prediction", "numbers", "map", "place", "accept", "undo", "stop")
TELLING = ("candidates", "values", "prediction")
