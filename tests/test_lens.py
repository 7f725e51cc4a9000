"""Lens without a browser: what its panes are told is right, an edit is a set, and corpus text stays text."""

import asyncio
import dataclasses
import io
import json
import os
import signal

import numpy as np
import pandas
import PIL.Image
import pytest
import torch

import distillkit as dk
from distillkit.view.lens import maps, panes
from distillkit.view.lens.film import filmed

HOSTILE = ["</script><script>alert(1)</script>", "\"'><img src=x onerror='alert(1)'>", "a & b &lt;", "bell \a",
           "\u202eturned", "]]> ${x}"]


@pytest.fixture(scope="module")
def start(world):
    return dk.DistilledSet.from_real(*world, per_class=2, length=10)


@pytest.fixture(scope="module")
def learned(start):
    """Its free positions moved by a little noise: the embeddings of no token."""
    noise = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    meta = {key: value for key, value in start.meta.items() if key != "text"}
    return dataclasses.replace(start, embeds=start.embeds + noise * start.free.unsqueeze(-1), tokens=None, meta=meta)


@pytest.fixture(scope="module")
def judge(world):
    return dk.FrozenJudge(*world, steps=20, batch_size=16)


@pytest.fixture
def lens(world, start, learned, judge):
    return dk.Lens([start, learned], world[1], task=world[0], judge=judge)


def array(lens, name):
    """An array as the front end reads it from the buffer."""
    kind, shape, begin = lens.content["arrays"][name]
    return np.frombuffer(lens.binary, kind, int(np.prod(shape)), begin).reshape(shape)


# --- the film


def distiller(world, start, path=None, lr=0.1):
    goal = dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
    return dk.Distiller(start, goal, lr=lr, checkpoint=path, checkpoint_every=100)


def test_a_film_goes_on_where_the_run_was_left(world, start, tmp_path):
    whole = [record.loss for record in dk.record_film(distiller(world, start), tmp_path / "whole", 6, frames=4)]
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [f"{step:08d}.frame" for step in (0, 2, 4, 6)]
    first = dk.record_film(distiller(world, start, tmp_path / "run"), tmp_path / "parts", 6, frames=4)
    for _ in range(3):
        next(first)
    first.close()
    second = dk.record_film(distiller(world, start, tmp_path / "run"), tmp_path / "parts", 6, frames=4)
    rest = [record.loss for record in second]
    assert rest == whole[3:]
    one, other = (filmed(tmp_path / name, world[1]) for name in ("whole", "parts"))
    assert one.names == ("step 0", "step 2", "step 4", "step 6")
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(one.sets, other.sets, strict=True))
    with pytest.raises(ValueError, match="other settings: rates.embeds"):
        next(dk.record_film(distiller(world, start, lr=0.3), tmp_path / "whole", 6))


@pytest.mark.parametrize(("arguments", "named"), [
    ({"distiller": None}, "distiller"), ({"n": 0}, "n "), ({"frames": 1}, "frames"),
])
def test_a_film_that_cannot_be(world, start, tmp_path, arguments, named):
    good = {"distiller": distiller(world, start), "folder": tmp_path / "film", "n": 3}
    with pytest.raises((TypeError, ValueError), match=named):
        next(dk.record_film(**good | arguments))


def test_a_film_measures_distances_in_units_of_words(world, start, learned):
    film, table = filmed({"real": start, "learned": learned}, world[1]), world[1].embedding
    assert film.names == ("real", "learned") and film.yardstick > 0
    assert np.array_equal(film.tokens[0][start.mask], start.tokens[start.mask])
    assert np.array_equal(film.tokens[1], dk.project(learned, world[1]).tokens)
    free = learned.free
    away = (learned.embeds[free] - table[torch.from_numpy(film.tokens[1])[free]]).norm(dim=1) / film.yardstick
    assert film.distances[1][free] == pytest.approx(away.numpy(), abs=1e-6) and np.isnan(film.distances[1][~free]).all()
    moved = (learned.embeds - start.embeds)[free].norm(dim=1) / film.yardstick
    assert film.moved[1][free] == pytest.approx(moved.numpy(), abs=1e-5) and not film.moved[0][free].any()
    assert film.places.tolist() == free.nonzero().tolist()


def test_sets_of_other_shapes_stand_side_by_side(world, start):
    small = dk.DistilledSet.from_real(*world, per_class=1, length=6)
    film = filmed({"two": start, "one": small}, world[1])
    assert film.tokens.shape == (2, 4, 10) and (film.tokens[1, 2:] == -1).all() and (film.tokens[1, :, 6:] == -1).all()
    flat = maps.make_map(film, world[1])
    absent = [not small.free[e, p] if e < 2 and p < 6 else True for e, p in film.places]
    assert np.isnan(flat.points[1]).all(1).tolist() == absent and np.isfinite(flat.points[0]).all()


def test_nothing_to_look_at(world, tmp_path):
    for history, error in (([], ValueError), ({}, ValueError), ([None], TypeError), (3, TypeError), (tmp_path, ValueError)):
        with pytest.raises(error, match="history|holds no film"):
            dk.Lens(history, world[1])


@pytest.mark.parametrize("argument", ["student", "real", "task"])
def test_a_bad_argument_is_named(world, start, argument):
    with pytest.raises(TypeError, match=argument):
        dk.Lens(**{"history": start, "student": world[1]} | {argument: 3})


# --- the map


def test_words_stay_while_learned_positions_move(lens, world, start):
    flat = lens.maps["pca"]
    word = dict(zip(flat.words.tolist(), flat.background.tolist(), strict=True))
    tokens = start.tokens[start.free].tolist()
    assert flat.points[0] == pytest.approx(np.array([word[t] for t in tokens]), abs=1e-4), "in the first frame they are words"
    assert not np.allclose(flat.points[0], flat.points[1], atol=1e-3)
    assert all(0 <= share <= 1 for share in flat.preserved.values()) and 0 < flat.shuffled < 0.2
    points, background = array(lens, "pca.points"), array(lens, "pca.background")
    both = np.concatenate([flat.background, flat.points.reshape(-1, 2)])
    sent = np.concatenate([background, points.reshape(-1, 2)])
    unit = np.ptp(both, axis=0).max() / 65534
    assert np.abs((both - both.min(0)) / unit - sent).max() <= 0.51, "both axes on one scale, to the nearest of 65,535 steps"


def test_own_class_is_counted_by_hand(world, start, learned):
    film, labels = filmed([start, learned], world[1]), start.meta["labels"]
    shares = maps.own_class(film, 1, labels)
    owner = learned.free.nonzero()[:, 0]
    classes = torch.tensor(labels)[owner]
    away = torch.cdist(learned.embeds[learned.free].double(), learned.embeds[learned.free].double())
    counted = owner[:, None] != owner
    nearest = away.masked_fill(~counted, torch.inf).argsort(1)[:, :10]
    same = classes[:, None] == classes
    assert shares["share"] == pytest.approx(same.gather(1, nearest).double().mean().item())
    assert shares["chance"] == pytest.approx(((same & counted).sum(1) / counted.sum(1)).mean().item())
    assert 0 <= shares["control"] <= 1 and np.isnan(maps.own_class(film, 0, labels)["control"])
    assert maps.own_class(filmed(dk.DistilledSet.from_real(*world, per_class=1, length=8), world[1]), 0, [0, 1]) is None


# --- tokens, heads, workbench


def test_the_front_end_gets_the_words(lens, world, start, learned):
    words = lens.content["words"].split("\n")
    tokens = dk.project(learned, world[1]).tokens
    expected = [world[1].tokenizer.convert_ids_to_tokens(row.tolist()) for row in tokens]
    assert [[words[i] for i in row] for row in array(lens, "tokens")[1]] == expected
    assert np.array_equal(array(lens, "real"), array(lens, "tokens")[0]) and lens.content["frames"] == ["set 1", "set 2"]


def test_heads_are_attention_of_the_example_on_both_texts(lens, world, start, learned):
    reply, (part,) = lens.answer(["attention", 0, 1, 2])
    weights = np.frombuffer(part, np.uint8).reshape(reply["shape"]) / 255
    from distillkit.view.measures import attention
    for n, examples in enumerate((start, learned)):
        assert np.abs(weights[n] - attention(world[1], examples)[2]).max() <= 0.5 / 255 + 1e-6
    assert lens.answer(["attention", 0, 1, 2])[1][0] is part, "computed once"


def test_candidates_are_the_nearest_words_by_brute_force(world, learned, judge):
    student = world[1]
    choices = panes.candidates(learned, student, 1, 3, k=5, more=[7, 0], judge=judge)
    distances = (student.embedding - learned.embeds[1, 3]).norm(dim=1)
    nearest = sorted(set(range(len(distances))) - set(student.tokenizer.all_special_ids), key=distances.__getitem__)[:5]
    assert choices["token"].tolist() == [*nearest, *(i for i in (7, 0) if i not in nearest)]
    assert choices["distance"].tolist() == pytest.approx(distances[choices["token"].tolist()].tolist())
    sets = [panes.replaced(learned, student, 1, 3, token) for token in choices["token"]]
    losses = [panes.outer_loss(judge, one) for one in sets]
    assert choices["loss"].tolist() == pytest.approx(losses, abs=1e-5)
    assert choices["change"].tolist() == pytest.approx([loss - panes.outer_loss(judge, learned) for loss in losses], abs=1e-5)


@pytest.mark.parametrize("tokens", [True, False])
def test_a_replacement_changes_one_position_and_nothing_else(world, start, learned, tokens):
    student, before = world[1], start if tokens else learned
    embeds = before.embeds.clone()
    after = panes.replaced(before, student, 2, 4, 50)
    assert (after.embeds != before.embeds).any(-1).nonzero().tolist() == [[2, 4]]
    assert torch.equal(after.embeds[2, 4], student.embedding[50]) and torch.equal(before.embeds, embeds)
    assert after.tokens is None if not tokens else after.meta["text"][2] == student.tokenizer.decode(after.tokens[2, 1:9])
    for position, token in ((0, 50), (99, 50), (4, 10**6)):
        with pytest.raises(ValueError, match="position|token"):
            panes.replaced(before, student, 2, position, token)


@pytest.mark.parametrize("kind", ["frozen", "student"])
def test_training_value_is_the_loss_of_the_set_without_the_position(world, start, learned, judge, kind):
    if kind == "student":
        goal = dk.BPTT(*world, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
        judge = dk.StudentJudge(goal, tries=1)
    shares = []
    values = panes.training_values(learned, 1, judge, shares.append)
    assert np.isnan(values[[0, 9]]).all() and np.isfinite(values[1:9]).all() and shares[-1] <= 1 and shares == sorted(shares)
    embeds = learned.embeds.clone()
    embeds[1, 3:9] = learned.embeds[1, 4:10]
    mask, free = learned.mask.clone(), learned.free.clone()
    mask[1, 9] = free[1, 8:] = False
    short = dataclasses.replace(learned, embeds=embeds, mask=mask, free=free)
    expected = panes.outer_loss(judge, short) - panes.outer_loss(judge, learned)
    assert values[3] == pytest.approx(expected, abs=1e-5)
    text = panes.training_values(start, 1, judge)
    assert np.isfinite(text[1:9]).all() and not np.allclose(text[1:9], values[1:9], atol=1e-7)


def test_an_edit_is_a_set_and_can_be_taken_back(lens, world, learned):
    lens.example, lens.position = 1, 3
    assert lens.edited is lens.film.sets[1]
    lens.accept(50)
    lens.answer(["accept", 1, 1, 4, 60])
    assert [(e["position"], e["token"]) for e in lens.edits] == [(3, 50), (4, 60)] and lens.revision == 2
    expected = panes.replaced(panes.replaced(learned, world[1], 1, 3, 50), world[1], 1, 4, 60)
    assert torch.equal(lens.edited.embeds, expected.embeds) and isinstance(lens.edited, dk.DistilledSet)
    assert dk.project(lens.edited, world[1]).tokens[1, 3:5].tolist() == [50, 60]
    with pytest.raises(ValueError, match="edits of frame 1"):
        lens.accept(50, frame=0)
    with pytest.raises(ValueError, match="changed meanwhile"):
        lens.answer(["attention", 0, 1, 1])
    lens.undo()
    assert dk.project(lens.edited, world[1]).tokens[1, 3].item() == 50 and len(lens.edits) == 1
    lens.answer(["undo"])
    lens.undo()
    assert lens.edited is lens.film.sets[1] and lens.edits == [] and lens.revision == 0


def test_a_selection_comes_back_as_a_table(lens, world, learned):
    lens.selection = [0, 9, 10**6]
    table = lens.selected
    assert isinstance(table, pandas.DataFrame) and table[["example", "position"]].values.tolist() == [[0, 1], [1, 2]]
    tokens = dk.project(learned, world[1]).tokens
    assert table["word"].tolist() == world[1].tokenizer.convert_ids_to_tokens([tokens[0, 1].item(), tokens[1, 2].item()])


def test_what_is_looked_at_stays_within_the_film(lens):
    lens.frame, lens.example, lens.position = 99, -1, 99
    assert (lens.frame, lens.example, lens.position) == (1, 0, 9)


@pytest.mark.parametrize("ask", [None, [], ["eval", "1"], ["_content"], {"attention": 1}])
def test_a_question_that_is_none(lens, ask):
    with pytest.raises(ValueError, match="ask one of"):
        lens.answer(ask)


def test_a_problem_reaches_the_front_end_as_text(lens, monkeypatch):
    messages = []
    monkeypatch.setattr(lens, "send", lambda content, buffers=None: messages.append(content))
    lens._receive(lens, {"ask": ["candidates", 0, 1, 0, 0, ""]}, [])
    assert "no learned position 0" in messages[-1]["reply"]["problem"] and messages[-1]["key"] == '["candidates",0,1,0,0,""]'


# --- without a kernel


def test_a_page_holds_everything_and_no_text_of_it_is_markup(world, start, learned, tmp_path):
    meta = learned.meta | {"classes": HOSTILE[:2]}
    hostile = dk.Lens({name: dataclasses.replace(s, meta=meta) for name, s in zip(HOSTILE, (start, learned))}, world[1])
    text = hostile.save_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and "<img" not in text and text.count("</script>") == 2
    stored = json.loads(text.split('id="stored">')[1].split("</script>")[0])
    assert stored["state"]["content"]["frames"] == HOSTILE[:2]
    assert {json.dumps(["attention", 0, 1, e], separators=(",", ":")) for e in range(4)} <= stored["answers"].keys()
    assert "http:" not in text.replace("http://www.w3.org", "") and "https:" not in text


# --- a running distillation


def live_lens(world, start, path):
    return dk.Lens(distiller(world, start, path), world[1], task=world[0])


def test_lens_follows_a_run_and_a_stop_leaves_a_checkpoint(world, start, tmp_path):
    whole = distiller(world, start)
    losses = [record.loss for record in whole.run(6)]

    async def stopped():
        lens = live_lens(world, start, tmp_path / "run")
        lens.observe(lambda change: change.new["status"].startswith("step 3 of 6: loss") and lens.answer(["stop"]), "live")
        await lens.run(6, frames=7)
        return lens

    lens = asyncio.run(stopped())
    assert lens.live["status"].startswith("stopped at step 3 of 6") and lens.live["losses"] == losses[:3] and lens.live["ended"]
    assert lens.film.names == ("step 0", "step 1", "step 2", "step 3") and lens.frame == 3
    assert array(lens, "pca.points").shape[0] == 4 and lens.content["frames"] == list(lens.film.names)
    again = filmed(lens.film.sets, world[1])
    assert np.array_equal(lens.film.tokens, again.tokens) and np.array_equal(lens.film.moved, again.moved, equal_nan=True)

    async def resumed():
        lens = live_lens(world, start, tmp_path / "run")
        await lens.run(6)
        return lens

    lens = asyncio.run(resumed())
    assert lens.live["losses"] == losses and lens.live["status"].startswith("done at step 6")
    assert torch.equal(lens.film.sets[-1].embeds, whole.distilled.embeds) and lens.film.names[0] == "step 3"


def test_a_second_cell_takes_the_run_over(world, start, tmp_path):
    async def twice():
        first, path = live_lens(world, start, tmp_path / "run"), tmp_path / "run"
        first.run(50, folder=tmp_path / "film")
        while first.distiller.step < 2:
            await asyncio.sleep(0)
        second = live_lens(world, start, path)
        await second.run(5, folder=tmp_path / "other")
        return first, second

    first, second = asyncio.run(twice())
    assert "taken this run over" in first.live["status"] and first.live["ended"] and first.distiller.step < 50
    assert second.live["status"].startswith("done at step 5") and second.distiller.step == 5


def test_interrupting_the_kernel_stops_the_run(world, start, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    async def interrupted():
        lens = live_lens(world, start, tmp_path / "run")
        lens.observe(lambda change: change.new["losses"] and os.kill(os.getpid(), signal.SIGINT), "live")
        await lens.run(50)
        return lens

    lens = asyncio.run(interrupted())
    assert lens.live["status"].startswith("stopped at step 1 of 50") and signal.getsignal(signal.SIGINT) is before
    assert distiller(world, start, tmp_path / "run").step == 1


def test_frames_on_disk_come_before_those_of_the_run(world, start, tmp_path):
    async def part(steps):
        lens = live_lens(world, start, tmp_path / "run")
        await lens.run(steps, folder=tmp_path / "film", frames=steps + 1)
        return lens

    asyncio.run(part(2))
    lens = asyncio.run(part(4))
    assert lens.film.names == tuple(f"step {step}" for step in range(5))


def test_an_error_of_a_run_is_shown(world, start, tmp_path, monkeypatch):
    async def run():
        lens = live_lens(world, start, tmp_path / "run")

        def run_and_break(steps):
            raise RuntimeError("the student <broke>")
            yield

        monkeypatch.setattr(lens.distiller, "run", run_and_break)
        with pytest.raises(RuntimeError, match="broke"):
            await lens.run(3)
        return lens

    assert "the student <broke>" in asyncio.run(run()).live["status"]


def test_a_run_that_cannot_be(world, start, lens, tmp_path):
    with pytest.raises(ValueError, match="give Lens a Distiller"):
        lens.run(3)
    with pytest.raises(ValueError, match="frames"):
        live_lens(world, start, tmp_path / "run").run(3, frames=1)
    with pytest.raises(RuntimeError, match="no running event loop"):
        live_lens(world, start, tmp_path / "run").run(3)
    with pytest.raises(ValueError, match="give its Distiller a checkpoint"):
        live_lens(world, start, None).run(3)


# --- pictures


def test_the_picture_of_a_stored_notebook(lens, start):
    data, _ = lens._repr_mimebundle_()
    picture = PIL.Image.open(io.BytesIO(data["image/png"]))
    assert picture.format == "PNG" and np.asarray(picture).std() > 5 and data["text/plain"] == repr(lens)
    assert repr(lens) == "Lens: 2 frames of 4 examples with 10 positions"
    figure = lens.figure()
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["set 1", "set 2"]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert start.meta["text"][0].split()[0] in texts and any("The PCA keeps" in text.get_text() for text in figure.texts)


def test_the_picture_may_leave_panes_out(world, start, learned):
    """Each pane alone, and two of them; the words of a line are those of the whole picture."""
    def titles(figure):
        return [axes.get_title(loc="left").split(",")[0].split(":")[0] for axes in figure.axes if axes.get_title(loc="left")]

    lens = dk.Lens({"real": start, "learned": learned}, world[1], task=world[0], picture=("tokens",))
    assert titles(lens.figure()) == ["Example 1"] and "and learned" in lens.figure().axes[0].get_title(loc="left")
    assert titles(lens.figure(picture=["heads"])) == ["Attention"]
    assert titles(lens.figure(picture=["map"])) == ["real", "learned"] and not lens.figure().texts
    assert titles(lens.figure(picture=("tokens", "heads"))) == ["Example 1", "Attention"]
    words_of = [{text.get_text() for text in figure.axes[place].texts} for figure, place in (
        (lens.figure(), 0), (lens.figure(picture=("map", "tokens", "heads")), 2))]
    assert words_of[0] == words_of[1] and len(words_of[0]) > 5
    for wrong in ("tokens", [], ["poem"], None):
        with pytest.raises(ValueError, match="picture"):
            dk.Lens(start, world[1], picture=wrong)


def test_a_word_that_was_changed_has_a_frame_of_its_own(world):
    """Only its chip is framed in orange, and nothing is said of distances where every position is a word."""
    from matplotlib.colors import to_hex

    from distillkit.view.figures import ROLE_COLOURS

    real = dk.DistilledSet.from_real(*world, per_class=1, length=8)
    place = int(real.free[0].nonzero()[0])
    tokens = real.tokens.clone()
    tokens[0, place] = next(int(token) for token in real.tokens[1:].flatten() if token not in real.tokens[0])
    edited = dataclasses.replace(real, tokens=tokens, embeds=world[1].embedding[tokens].to(real.embeds))
    axes = dk.Lens({"real": real, "edited": edited}, world[1], task=world[0], picture=("tokens",)).figure().axes[0]
    edges = [to_hex(text.get_bbox_patch().get_edgecolor()) for text in axes.texts if text.get_bbox_patch()]
    assert [number for number, edge in enumerate(edges) if edge == ROLE_COLOURS["text"]] == [place]
    assert axes.get_title(loc="left").endswith("(orange frame: not the real word)")


def test_the_picture_may_be_of_a_umap(world, start, learned):
    lens = dk.Lens([start, learned], world[1], task=world[0])
    lens.maps["umap"] = dataclasses.replace(lens.maps["pca"], method="umap", points=-lens.maps["pca"].points)
    flat, umap = lens.figure(), lens.figure("umap")
    assert np.allclose(umap.axes[1].collections[-1].get_offsets(), -flat.axes[1].collections[-1].get_offsets())
    assert any("The UMAP keeps" in text.get_text() for text in umap.texts)
    with pytest.raises(ValueError, match="method must be one of"):
        lens.figure("tsne")


def test_a_film_as_a_gif(lens, tmp_path):
    film = PIL.Image.open(lens.save_gif(tmp_path / "lens.gif"))
    assert film.n_frames == 4 and film.format == "GIF" and (tmp_path / "lens.gif").stat().st_size < 400_000
    first = np.asarray(film.convert("RGB")).astype(int)
    film.seek(3)
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - first).max() > 50
