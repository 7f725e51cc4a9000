"""Lens in a real browser: clicked, scrubbed, lassoed and edited in JupyterLab, and its state read back in Python.

Nothing is fetched: the notebook is written here, its model and data come from the stand-in hub, and JupyterLab, started by
this interpreter, serves its own pages to a browser on the same machine.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
MISSING = [f"the Python package {name}" for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["a browser (chromium or google-chrome on the PATH; on Debian: apt-get install chromium)"]
PATIENCE = 400_000  # milliseconds: far above what anything here needs, on a machine that does ten other things

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"nothing is tried in a browser here: {' and '.join(MISSING)} missing"),
]
SHOTS = os.environ.get("DISTILLKIT_SCREENSHOTS")  # a folder of pictures to look at

CELLS = [
    """
import json
import distillkit as dk
task = dk.load_task("rotten_tomatoes", max_length=12)
student = dk.load_student("bert-base-uncased", task)
start = dk.DistilledSet.from_real(task, student, per_class=2, length=12)
goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)
distiller = dk.Distiller(start, goal, lr=0.2)
for record in dk.record_film(distiller, "film", 8, frames=5): pass
""",
    "lens = dk.Lens('film', student, task=task, judge=dk.FrozenJudge(task, student, steps=20, batch_size=16))\nlens",
    """
state = {name: getattr(lens, name) for name in ("frame", "example", "position", "selection", "edits")}
state["selected"] = lens.selected["word"].tolist()
state["embeds"] = lens.edited.embeds[lens.example, lens.position].tolist()
state["kind"] = type(lens.edited).__name__
with open("state.json", "w") as file: json.dump(state, file)
""",
]


@contextlib.contextmanager
def served(tmp_path, standin_home, sources):
    """The address of a notebook of these cells in a JupyterLab that knows nothing of the user's settings."""
    import standin_hub

    work, config, runtime = (tmp_path / name for name in ("work", "config", "runtime"))
    for folder in (work, config / "labconfig", runtime):
        folder.mkdir(parents=True)
    asks = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # it would ask the network
    (config / "labconfig" / "page_config.json").write_text(json.dumps(asks))
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), work / "play.ipynb")
    variables = standin_hub.environment(standin_home) | {
        "JUPYTER_CONFIG_DIR": str(config), "JUPYTER_RUNTIME_DIR": str(runtime), "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
        "--IdentityProvider.token=", f"--ServerApp.root_dir={work}",
    ]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=work, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        started = runtime / f"jpserver-{server.pid}.json"
        until = time.monotonic() + PATIENCE / 1000
        while not started.exists():
            assert server.poll() is None and time.monotonic() < until, f"JupyterLab did not start:\n{log.read_text()}"
            time.sleep(0.2)
        yield f"{json.loads(started.read_text())['url']}lab/tree/play.ipynb"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


@contextlib.contextmanager
def browsed(address, size):
    """The page at an address in a browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        yield page
        browser.close()


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def state_in_python(page, folder: Path) -> dict:
    """What the last cell says of the widget."""
    path = folder / "state.json"
    path.unlink(missing_ok=True)
    page.locator(".jp-Notebook .jp-CodeCell").last.locator(".jp-InputPrompt").click()
    page.keyboard.press("Control+Enter")
    until = time.monotonic() + PATIENCE / 1000
    while not path.exists():
        assert time.monotonic() < until, "the last cell was not run"
        page.wait_for_timeout(100)
    page.wait_for_timeout(300)
    return json.loads(path.read_text())


def test_four_panes_in_jupyterlab(tmp_path, standin_home):
    with served(tmp_path, standin_home, CELLS) as address, browsed(address, (1280, 1500)) as page:
        page.locator(".jp-Notebook .jp-CodeCell").last.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that, cells are run by nobody
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        run_all(page)
        lens, work = page.locator(".dk-lens"), tmp_path / "work"
        lens.locator(".dk-candidate").first.wait_for()
        lens.scroll_into_view_if_needed()
        assert lens.locator("output").inner_text() == "step 8" and lens.locator(".dk-pane").count() == 4

        # Time: the keyboard on the slider scrubs; the film plays to its end.
        slider = lens.locator("input[type=range]")
        slider.focus()
        page.keyboard.press("Home")
        lens.get_by_text("step 0", exact=True).wait_for()
        assert state_in_python(page, work)["frame"] == 0
        lens.get_by_label("play the film").click()
        lens.get_by_text("step 8", exact=True).wait_for()  # its end; the button says ▶ before the first frame moves, too
        lens.get_by_label("play the film").filter(has_text="▶").wait_for()  # it rests again
        assert state_in_python(page, work)["frame"] == 4

        # Tokens: a word is chosen; the other panes and Python follow.
        lens.locator(".dk-chip:enabled").nth(3).click()
        assert "position 4" in lens.locator(".dk-where").inner_text()
        lens.get_by_label("colour by: rise of the outer loss").click()
        lens.locator(".dk-scale", has_text="rise of the outer loss").wait_for()
        before = state_in_python(page, work)
        assert (before["example"], before["position"]) == (0, 4)

        # Heads: differences of all heads; one enlarged.
        lens.locator(".dk-heads .dk-numbers", has_text="Layer 1, head 1").wait_for()
        lens.locator(".dk-heads canvas").click(position={"x": 60, "y": 40})
        lens.locator(".dk-heads .dk-numbers", has_text="looks at").wait_for()

        # Workbench: a word is accepted, taken back, accepted again.
        token = int(lens.locator(".dk-candidate").nth(2).get_attribute("data-token"))
        lens.locator(".dk-candidate").nth(2).click()
        lens.locator(".dk-edited").wait_for()
        lens.get_by_label("1 edited").wait_for()  # the map has it where its word is
        lens.get_by_role("button", name="ask a student").or_(lens.get_by_label("train a student")).click()
        lens.locator(".dk-shares", has_text="after edit").wait_for()
        after = state_in_python(page, work)
        assert [edit["token"] for edit in after["edits"]] == [token] and after["kind"] == "DistilledSet"
        assert after["embeds"] != before["embeds"]
        lens.get_by_label("take the last edit back").click()
        page.wait_for_function("() => !document.querySelector('.dk-edited')")
        lens.get_by_label("0 edited").wait_for()
        assert "after edit" not in lens.locator(".dk-shares").inner_text()
        assert state_in_python(page, work)["embeds"] == before["embeds"]

        # Map: a lasso round everything, then a search.
        box = lens.locator(".dk-map canvas").bounding_box()
        lens.get_by_label("draw round positions").click()
        left, top, right, bottom = box["x"] + 2, box["y"] + 2, box["x"] + box["width"] - 2, box["y"] + box["height"] - 2
        page.mouse.move(left, top)
        page.mouse.down()
        for x, y in ((right, top), (right, bottom), (left, bottom), (left, top + 3)):
            page.mouse.move(x, y, steps=3)
        page.mouse.up()
        chosen = state_in_python(page, work)
        assert chosen["selection"] == list(range(len(chosen["selected"]))) and len(chosen["selection"]) == 40
        assert "of 10 nearest neighbours" in lens.locator(".dk-map .dk-numbers").inner_text()
        word = chosen["selected"][0]
        lens.get_by_label("find a word on the map").fill(word)
        lens.get_by_label("find a word on the map").press("Enter")
        assert all(word in other for other in state_in_python(page, work)["selected"])
        assert not problems
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / "lens.png", full_page=True)


HOSTILE = ["<img src=x onerror=window.broken=1>", "</script><script>window.broken=1</script>", "<b class=smuggled>&amp;</b>"]


def test_a_page_without_a_kernel_shows_text_as_text(world, tmp_path):
    import distillkit as dk
    from distillkit.view.lens import page as pages
    from distillkit.view.lens import wire
    from distillkit.view.lens.lens import STATE

    start = dk.DistilledSet.from_real(*world, per_class=2, length=10)
    judge = dk.FrozenJudge(*world, steps=20, batch_size=16)
    lens = dk.Lens({"one": start, "other": start}, world[1], judge=judge, reader=world[1])
    lens.answer(["candidates", 0, 1, 0, 1, ""])[0]["rows"][0]["word"] = HOSTILE[0]
    lens.save_html(tmp_path / "lens.html")  # which asks for what a page needs
    lens.answer(["reading", 0, 1, 0])[0]["stretches"][1].pieces[:] = [(HOSTILE[1], True), (HOSTILE[2], False)]
    words = lens.content["words"].split("\n")
    content = lens.content | {"words": "\n".join(HOSTILE[i % 3] for i in range(len(words))), "classes": HOSTILE[:2],
                              "frames": HOSTILE[1:]}
    state = {name: getattr(lens, name) for name in STATE} | {"content": content}
    text = pages.page(HOSTILE[1], state, lens._answers, wire.script("page"), wire.style())
    (tmp_path / "hostile.html").write_text(text, encoding="utf-8")
    with browsed((tmp_path / "hostile.html").as_uri(), (872, 900)) as page:
        page.locator(".dk-candidate").first.wait_for()
        assert page.locator(".dk-candidate b").first.inner_text() == HOSTILE[0]
        assert page.locator(".dk-cut, s.dk-piece").count() == 1 and page.locator(".dk-piece").count() == 9
        assert {*page.locator(".dk-piece").all_inner_texts()} >= {*HOSTILE[1:]}
        assert {*page.locator(".dk-chip").all_inner_texts()} <= {*HOSTILE} and page.locator(".dk-chip").count() == 10
        page.locator(".dk-heads canvas").click(position={"x": 60, "y": 40})
        page.locator(".dk-heads .dk-numbers", has_text="looks at").wait_for()
        page.locator(".dk-map canvas").hover(position={"x": 300, "y": 150})
        page.get_by_label("find a word on the map").fill("smuggled")
        page.get_by_label("colour by: rise of the outer loss").click()
        page.locator(".dk-scale", has_text="Not stored in this page").wait_for()
        page.locator(".dk-candidate").nth(1).click()
        page.locator(".dk-workbench", has_text="Not stored in this page").wait_for()
        assert page.locator(".smuggled, .dk-lens img, .dk-lens script").count() == 0
        assert page.evaluate("() => window.broken") is None


def strokes(page, selector: str, left: float, right: float) -> list[float]:
    """How much is drawn in each row of a canvas between two places, shares of its width."""
    return page.evaluate("""([selector, left, right]) => {
        const canvas = document.querySelector(selector), from = Math.round(left * canvas.width);
        const size = [Math.round((right - left) * canvas.width), canvas.height];
        const { data, width, height } = canvas.getContext("2d").getImageData(from, 0, ...size);
        const rows = [];
        for (let y = 0; y < height; y++) {
            let sum = 0;
            for (let x = 0; x < width; x++) sum += data[4 * (y * width + x) + 3];
            rows.push(sum / 255);
        }
        return rows;
    }""", [selector, left, right])


def test_arcs_follow_the_pointer_and_a_locked_head_stays(world, tmp_path):
    import dataclasses

    import torch

    import distillkit as dk

    start = dk.DistilledSet.from_real(*world, per_class=2, length=10)
    noise = torch.randn(start.embeds.shape, generator=torch.Generator().manual_seed(0)) * 0.3 * start.free[..., None]
    learned = dataclasses.replace(start, embeds=start.embeds + noise, tokens=None)
    small = dk.DistilledSet.from_real(*world, per_class=1, length=8)
    lens = dk.Lens({"real": start, "learned": learned, "small": small}, world[1], task=world[0])
    lens.frame = 1
    lens.accept(50, example=0, position=3)
    words = [lens.student.tokenizer.convert_ids_to_tokens(row) for row in lens.film.tokens[1].tolist()]
    with browsed(lens.save_html(tmp_path / "lens.html").as_uri(), (1280, 800)) as page:
        canvas, note = page.locator(".dk-heads canvas"), page.locator(".dk-heads .dk-numbers")
        note.filter(has_text="Layer 1, head 1").wait_for()
        map_box, heads_box = (page.locator(f".dk-{name}").bounding_box() for name in ("map", "heads"))
        assert heads_box["height"] == map_box["height"]
        gap = heads_box["y"] + heads_box["height"] - note.bounding_box()["y"] - note.bounding_box()["height"]
        assert gap < 20 and note.bounding_box()["y"] - canvas.bounding_box()["y"] - canvas.bounding_box()["height"] < 20

        # One head is enlarged; arcs begin at the row under the pointer, and others at another row.
        canvas.click(position={"x": 60, "y": 40})
        note.filter(has_text="looks at").wait_for()
        unit = canvas.bounding_box()["height"] / 10
        for row in (2, 7):
            canvas.hover(position={"x": 50, "y": unit * (row + 0.4)})
            note.filter(has_text=f"“{words[0][row]}” looks at").wait_for()
            assert sum(strokes(page, ".dk-heads canvas", 0.7, 1)) > 50, "arcs reach far to the right"
            begun = strokes(page, ".dk-heads canvas", 0.6, 0.62)
            assert begun.index(max(begun)) // unit == row, "most ink is where all arcs begin"

        # A word in the pane of tokens does the same.
        page.locator(".dk-column").nth(4).hover()
        note.filter(has_text=f"“{words[0][4]}” looks at").wait_for()

        # Locked: another example, another set and the pointer elsewhere leave it.
        locked = note.inner_text().split(":")[0]
        page.get_by_label("next example").click()
        note.filter(has_text=f"“{words[1][lens.film.places[0][1]]}” looks at").wait_for()
        assert note.inner_text().startswith(locked) and page.get_by_label("show all heads").is_visible()
        for name in ("small", "real"):
            page.get_by_role("button", name=f"show the set {name}").click()
            page.get_by_role("button", name=f"show the set {name}").and_(page.locator("[aria-pressed=true]")).wait_for()
            assert note.inner_text().startswith(locked)
        page.get_by_label("show all heads").click()
        note.filter(has_text="click to enlarge").wait_for()

        # Sets by name: buttons and no slider; the edit is on the map of its set only.
        assert page.locator("input[type=range]").is_hidden() and page.locator(".dk-sets button").count() == 3
        assert page.get_by_label("0 edited").is_visible()
        page.get_by_role("button", name="show the set learned").click()
        page.get_by_label("1 edited").wait_for()
        page.get_by_role("button", name="show the set small").click()
        page.get_by_label("0 edited").wait_for()
        page.locator("option:enabled", has_text="of 2:").nth(1).wait_for(state="attached")
        assert page.locator("option:disabled", has_text="not in this set").count() == 2


def test_thirty_thousand_words_and_two_thousand_positions_play_smoothly(tmp_path):
    import numpy as np

    from distillkit.view.lens import page as pages
    from distillkit.view.lens import still, wire

    draw, frames, shape, words = np.random.default_rng(0), 40, (40, 50), 30_000
    background = draw.normal(size=(words, 2)).astype("float32")
    first = background[draw.integers(0, words, 2000)]
    points = np.stack([first + 0.03 * frame * draw.normal(size=first.shape) for frame in range(frames)]).astype("float32")
    numbers = draw.random((frames, *shape)).astype("float32")
    places, scale = wire.scaled("pca", background, points)
    arrays = {"tokens": draw.integers(0, words, (frames, *shape)).astype("int32"), "distances": numbers, "moved": numbers,
              "learned": np.ones(shape, "uint8"), "real": draw.integers(0, words, shape).astype("int32"),
              "pca.words": np.arange(words, dtype="int32"), **places,
              "in_text": (draw.random(words) < 0.2).astype("uint8"),
              "labels": np.tile(np.arange(shape[0], dtype="int32") % 4, (frames, 1))}
    content, binary = wire.packed({
        "frames": [f"step {frame}" for frame in range(frames)], "words": "\n".join(f"word{i}" for i in range(words)),
        "classes": list("abcd"), "choices": False, "probabilities": [None] * frames, "classifies": False,
        "maps": {"pca": {"preserved": {39: 0.1}, "shuffled": 0.01, "scale": scale}}, "has_judge": False, "reader": None,
        "colours": {"real": "#8c8c8c", "learned": "#0173b2", "classes": still.CLASS_COLOURS}}, arrays)
    state = {"content": content, "binary": binary, "frame": 0, "example": 0, "position": 0, "selection": [], "edits": [],
             "revision": 0, "live": {}}
    (tmp_path / "large.html").write_text(pages.page("large", state, {}, wire.script("page"), wire.style()), encoding="utf-8")
    with browsed((tmp_path / "large.html").as_uri(), (872, 900)) as page:
        page.get_by_label("larger map, or back").click()
        page.wait_for_function("() => document.querySelector('.dk-map canvas').clientHeight >= 600")
        assert page.evaluate("() => document.querySelector('.dk-map canvas').clientWidth") >= 800
        medians = []
        for _ in range(3):  # the best of three, since a test shares its cores
            medians.append(page.evaluate("""() => new Promise(done => {
                const times = [];
                let before = performance.now();
                const tick = now => {
                    times.push(now - before);
                    before = now;
                    if (times.length < 120) requestAnimationFrame(tick); else done(times.sort((a, b) => a - b)[60]);
                };
                document.querySelector('.dk-bar-top button').click();
                requestAnimationFrame(tick);
            })"""))
            page.get_by_label("play the film").filter(has_text="▶").wait_for()
        print("median frame times", *(f"{median:.0f}" for median in medians), "ms")
        assert min(medians) <= 34
