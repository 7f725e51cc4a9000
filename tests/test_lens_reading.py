"""Lens where text is read by another tokenizer, and where the student is a decoder: every pane says what is so."""

import dataclasses
import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import distillkit as dk
from distillkit.io.packaged import ASSETS
from distillkit.text.projection import with_tokens
from distillkit.view.lens import panes, reading
from distillkit.view.lens.reading import Piece
from distillkit.view.measures import attention

TEXT = "Returns the eigenvalues café of a Hermitian matrix."


@pytest.fixture(scope="module", params=["tiny-opt", "tiny-llama"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(ASSETS / request.param)


# --- one text, two tokenizers


def test_pieces_are_the_characters_of_the_tokens(tokenizer):
    pieces = reading.pieces(tokenizer, TEXT)
    assert "".join(TEXT[piece.start : piece.end] for piece in pieces) == TEXT.replace(" ", "")
    assert all(piece.read for piece in pieces)
    assert len(pieces) > len(TEXT.split())


@pytest.mark.parametrize("limit", [4, -4])
def test_tokens_beyond_the_limit_are_not_read(tokenizer, limit):
    every, some = reading.pieces(tokenizer, TEXT), reading.pieces(tokenizer, TEXT, limit)
    assert [piece[:2] for piece in some] == [piece[:2] for piece in every]
    read = [True] * 4 + [False] * (len(every) - 4)
    assert [piece.read for piece in some] == read[:: 1 if limit > 0 else -1]


def word_pieces(*known):
    """A tokenizer that knows these word pieces."""
    vocabulary = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(["[UNK]", *known])}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer, vocabulary.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]")


def test_an_unknown_token_is_not_read():
    pieces = reading.pieces(word_pieces("ab", "##c"), "abc xyz")
    assert pieces == [Piece(0, 2, True), Piece(2, 3, True), Piece(4, 7, False)]


def test_a_stretch_ends_where_both_end_a_token():
    one, other = word_pieces("a", "abc", "x", "##y", "##z"), word_pieces("a", "ab", "##c")
    ids = np.array([-1, *one("a abc xyz a")["input_ids"], 0])
    assert reading.stretches(one, ids, other, limit=lambda text: {"a abc xyz a": 4}[text]) == [
        ([0], [], True), ([1], [("a", True)], True), ([2], [("ab", True), ("c", True)], False),
        ([3, 4, 5], [("xyz", False)], False), ([6], [("a", False)], True), ([7], [], True)]


@pytest.mark.parametrize("text", ["a café for naïve\n\n  eigenvalues", "", "f(x)  \n", "車 ends"])
def test_a_tokenizer_reads_itself_alike(tokenizer, text):
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=int)
    stretches = reading.stretches(tokenizer, ids, tokenizer)
    assert all(stretch.alike for stretch in stretches)
    assert sum(len(stretch.positions) for stretch in stretches) == len(ids)


def test_tokens_are_shown_as_text(tokenizer):
    ids = tokenizer("Class for\n café", add_special_tokens=False)["input_ids"]
    words = reading.words(tokenizer, [-1, *ids])
    assert words[0] == "" and "⏎" in words and "␣for" in words and not any(mark in "".join(words) for mark in "ĠĊ▁ ")


# --- Lens with a reader


@pytest.fixture(scope="module")
def crossing(docstrings):
    """A real and a changed set of MiniLM's word pieces, and the decoder that is to read them."""
    task = dk.load_task("docstrings", max_length=24, limit=60)
    student, reader = (dk.load_student(f"offline:{name}", task) for name in ("minilm", "tiny-opt"))
    start = dk.select(task, student, "random", per_class=1, length=24)
    tokens = start.tokens.clone()
    tokens[0, 1:3] = torch.tensor(student.tokenizer.convert_tokens_to_ids(["##es", "inappropriate"]))
    return task, student, reader, start, with_tokens(start, student, tokens)


def test_a_reader_reads_as_many_tokens_as_the_moved_set_has(crossing):
    task, student, reader, start, changed = crossing
    lens = dk.Lens({"real": start, "changed": changed}, student, task=task, reader=reader)
    moved = dk.retokenize(changed, task, reader)
    needed, read = 0, []
    for example in range(len(changed)):
        stretches = lens.answer(["reading", 0, 1, example])[0]["stretches"]
        assert [place for positions, _, _ in stretches for place in positions] == [*range(24)]
        pieces = [piece for _, some, _ in stretches for piece in some]
        needed += len(pieces)
        read.append(sum(flag for _, flag in pieces))
    assert read == moved.free.sum(1).tolist() and needed == moved.meta["retokenized"]["tokens_after"]
    first = lens.answer(["reading", 0, 1, 0])[0]["stretches"]
    assert first[0] == ([0], [], True) and first[1][1][:2] == [("##", True), ("es", True)]
    again = dk.Lens(changed, student, reader=student).answer(["reading", 0, 0, 0])[0]["stretches"]
    assert [text for text, _ in again[1][1]] == ["#", "#", "es"], "its own tokenizer has no inside of a word at the beginning"


def test_the_picture_and_the_page_have_what_the_reader_reads(crossing, tmp_path):
    task, student, reader, start, changed = crossing
    lens = dk.Lens({"real": start, "changed": changed}, student, task=task, reader=reader)
    figure = lens.figure()
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"##", "es", "##es"} <= {*texts} and len(figure.axes) == 3, "two maps and the words, no heads"
    unread = sum(not flag for _, some, _ in lens.answer(["reading", 0, 1, 0])[0]["stretches"] for _, flag in some)
    assert unread and len(figure.axes[-1].lines) == unread, "struck through"
    text = lens.save_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    stored = json.loads(text.split('id="stored">')[1].split("</script>")[0])
    keys = {json.dumps(["reading", 0, frame, example], separators=(",", ":")) for frame in (0, 1) for example in range(6)}
    assert keys <= stored["answers"].keys() and stored["state"]["content"]["reader"] == "offline:tiny-opt"


def test_an_edit_is_read_too(crossing):
    task, student, reader, start, _ = crossing
    lens = dk.Lens(start, student, reader=reader)
    lens.accept(student.tokenizer.convert_tokens_to_ids("##ues"), example=0, position=3)
    word = student.tokenizer.convert_ids_to_tokens([lens.edits[0]["token"]])[0]
    stretches = lens.answer(["reading", 1, 0, 0])[0]["stretches"]
    (changed,) = [pieces for positions, pieces, _ in stretches if 3 in positions]
    assert word.removeprefix("##") in "".join(text for text, _ in changed) and all(read for _, read in changed)


def test_without_a_reader_there_is_nothing_to_read(crossing):
    lens = dk.Lens(crossing[3], crossing[1])
    with pytest.raises(ValueError, match="reader="):
        lens.answer(["reading", 0, 0, 0])
    with pytest.raises(TypeError, match="reader"):
        dk.Lens(crossing[3], crossing[1], reader="offline:tiny-opt")


# --- decoders and instruction sets


@pytest.fixture(scope="module", params=["instruction", "classification"])
def decoded(request, task, docstrings, tmp_path_factory):
    """A film of a decoder's set, its student, task, and judge."""
    if request.param == "instruction":
        task = dk.load_task("docstrings_qa:library", max_length=24, limit=60)
    student = dk.load_student("offline:tiny-opt", task)
    size = {"per_class": 2} if task.classes else {"fraction": 0.1}
    start = dk.select(task, student, "random", length=task.max_length, **size)
    goal = dk.BPTT(task, student, dk.Unroll(1, optimizer=dk.SGD(0.05)), metagrad=dk.Replay(), batch_size=8)
    folder = tmp_path_factory.mktemp("film")
    for _ in dk.record_film(dk.Distiller(start, goal, lr=0.02), folder, 2, frames=3):
        pass
    return folder, student, task, dk.StudentJudge(goal, tries=1)


def test_a_decoder_goes_through_every_pane(decoded, tmp_path):
    folder, student, task, judge = decoded
    lens = dk.Lens(folder, student, task=task, judge=judge, reader=student)
    last = lens.film.sets[-1]
    assert lens.film.names == ("step 0", "step 1", "step 2") and lens.film.distances[-1][last.free].min() > 0
    # Tokens: above stand the rows that the set was taken from, as text.
    shown, (kind, shape, begin) = lens.content["words"].split("\n"), lens.content["arrays"]["real"]
    real = np.frombuffer(lens.binary, kind, int(np.prod(shape)), begin).reshape(shape)
    row = [shown[i] for i in real[0] if i >= 0]
    ids = task.token_ids(student.tokenizer, "train")[last.meta["rows"][0]]
    assert row[1:] == reading.words(student.tokenizer, ids)[1 - len(row) :] and any(word.startswith("␣") for word in row)
    # Heads: no position looks ahead, and the numbers are those of the set alone.
    reply, (part,) = lens.answer(["attention", 0, 2, 1])
    weights = np.frombuffer(part, np.uint8).reshape(reply["shape"]) / 255
    assert weights.shape[0] == 2 and not np.triu(weights, 1).any() and weights.any()
    length = weights.shape[-1]
    assert np.abs(weights[1] - attention(student, last)[1][..., :length, :length]).max() <= 0.5 / 255 + 1e-5
    # Candidates with losses, and the label or the response.
    position = int(last.free[1].nonzero()[2])
    table = lens.answer(["candidates", 0, 2, 1, position, " array"])[0]["rows"]
    losses = [panes.outer_loss(judge, panes.replaced(last, student, 1, position, row["token"])) for row in table[:2]]
    assert [row["loss"] for row in table[:2]] == pytest.approx(losses, abs=1e-4) and "␣array" in [row["word"] for row in table]
    names, labels, probabilities = panes.labels_of(last)
    assert lens.content["classes"] == names and (probabilities is None) == (task.kind == "instruction")
    if probabilities is None:
        assert [names[label] for label in labels] == last.meta["responses"]
    assert all(alike for _, _, alike in lens.answer(["reading", 0, 0, 1])[0]["stretches"]), "it reads its own text"
    # An edit, the picture, the film and the page.
    lens.accept(table[0]["token"], example=1, position=position)
    assert torch.equal(lens.edited.targets, last.targets) and not torch.equal(lens.edited.embeds, last.embeds)
    lens.undo()
    picture = PIL.Image.open(io.BytesIO(lens._repr_mimebundle_()[0]["image/png"]))
    assert np.asarray(picture).std() > 5
    assert PIL.Image.open(lens.save_gif(tmp_path / "lens.gif")).n_frames == 7
    text = lens.save_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and '["attention",0,2,1]' in json.loads(
        text.split('id="stored">')[1].split("</script>")[0])["answers"]


def test_training_value_of_a_prompt_is_its_loss_without_the_position(decoded):
    folder, student, task, judge = decoded
    last = dk.Lens(folder, student, task=task).film.sets[-1]
    one = dataclasses.replace(last, free=last.free.clone())
    positions = last.free[1].nonzero().squeeze(1).tolist()
    one.free[1, positions[2:]] = False  # two positions are enough here
    values = panes.training_values(one, 1, judge)
    assert np.isfinite(values[positions[:2]]).all() and np.isnan(values[positions[2:]]).all()
    shorter = panes.without(one, 1, positions[0])
    assert shorter.mask[1].sum() == last.mask[1].sum() - 1
    expected = panes.outer_loss(judge, shorter) - panes.outer_loss(judge, one)
    assert values[positions[0]] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_loses_its_beginning_at_another_model(docstrings):
    task = dk.load_task("docstrings_qa:library", max_length=24, limit=60)
    student, reader = (dk.load_student(f"offline:{name}", task) for name in ("tiny-opt", "tiny-llama"))
    prompts = dk.select(task, student, "random", fraction=0.1)
    short = dataclasses.replace(task, max_length=12)
    lens = dk.Lens(prompts, student, task=short, reader=reader)
    moved = dk.retokenize(prompts, short, reader)
    for example in range(len(prompts)):
        flags = [read for _, some, _ in lens.answer(["reading", 0, 0, example])[0]["stretches"] for _, read in some]
        assert flags == sorted(flags) and sum(flags) == int(moved.free[example].sum())
