"""The widgets in a real browser: JupyterLab, headless Chromium, a slider moved, and the picture seen to change.

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
    pytest.mark.skipif(bool(MISSING), reason=f"the widgets are not tried in a browser here: {' and '.join(MISSING)} missing"),
]

CELLS = [
    """
import dataclasses, torch
import distillkit as dk
from distillkit.view import widgets
task = dk.load_task("rotten_tomatoes", max_length=12)
student = dk.load_student("bert-base-uncased", task)
real = dk.DistilledSet.from_real(task, student, per_class=2, length=12)
noise = torch.randn(real.embeds.shape, generator=torch.Generator().manual_seed(0)) * 0.05
learned = dataclasses.replace(real, embeds=real.embeds + noise, tokens=None)
""",
    # Heads that have made up their minds: those of a tiny random model look at everything alike.
    "params = {n: 20 * p if 'query.w' in n or 'key.w' in n else p for n, p in student.init(0).items()}\n"
    "attention = widgets.attention_explorer(student, params, learned, real)\nattention.add_class('the-attention')",
    "judge = widgets.outer_loss(dk.FrozenJudge(task, student, steps=20, batch_size=16))\n"
    "prompts = widgets.prompt_explorer(learned, student, score=judge, k=5)\nprompts.add_class('the-prompts')",
    "texts = [*task.train['text'][:20], '<b class=smuggled>&amp;</b>']\n"
    "points = [[i % 5, i // 5] for i in range(21)]\n"
    "flat = widgets.map_explorer(points, texts, ['neg', 'pos', 'neg'] * 7)\nflat.add_class('the-map')",
    "goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.5)), metagrad=dk.Replay(), batch_size=8)\n"
    "distiller = dk.Distiller(real, goal, checkpoint='run', checkpoint_every=10**6)\n"
    "running = widgets.monitor(distiller, 10**5)\nrunning.add_class('the-monitor')",
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
def opened(address, size=(1400, 2600)):
    """That notebook, open in a browser, with a kernel that waits."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator(".jp-Notebook .jp-CodeCell").last.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that, cells are run by nobody
        yield page
        browser.close()


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


@pytest.fixture
def page(tmp_path, standin_home):
    """The notebook, all its cells run."""
    with served(tmp_path, standin_home, CELLS) as address, opened(address) as page:
        run_all(page)
        page.locator(".the-monitor button:enabled").wait_for()
        yield page


def looks(page, name: str) -> bytes:
    """What is drawn below the sliders of that widget, as a picture."""
    return page.locator(f".{name} .widget-html-content").last.screenshot()


def move(page, name: str, slider: str) -> None:
    """Press the right arrow on a slider, and wait until what it shows is another."""
    content = page.locator(f".{name} .widget-html-content").last
    before = content.inner_html()
    page.locator(f".{name} .widget-inline-hbox", has_text=slider).locator(".noUi-handle").press("ArrowRight")
    page.wait_for_function(
        "([name, before]) => [...document.querySelectorAll(`.${name} .widget-html-content`)].pop().innerHTML !== before",
        arg=[name, before],
    )


def redraw(page, name: str, slider: str, key: str) -> float:
    """Milliseconds from the press of a key on a slider until the browser has drawn what came of it."""
    page.evaluate(
        """name => {
            const content = [...document.querySelectorAll(`.${name} .widget-html-content`)].pop();
            window.redrawn = new Promise(done => {
                let begun;
                document.addEventListener('keydown', () => { begun = performance.now(); }, {once: true, capture: true});
                new MutationObserver((_, seen) => {
                    seen.disconnect();  // the second frame begins when the first has been painted
                    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - begun)));
                }).observe(content, {childList: true, subtree: true});
            });
        }""", name)
    page.locator(f".{name} .widget-inline-hbox", has_text=slider).locator(".noUi-handle").press(key)
    return page.evaluate("() => window.redrawn")


def test_the_widgets_in_a_browser(page, tmp_path):
    # The monitor runs in the kernel's loop, beside the rest; a click comes through and leaves a checkpoint.
    status = page.locator(".the-monitor .widget-html-content").first
    page.locator(".the-monitor button").click()
    page.wait_for_function("() => document.querySelector('.the-monitor').textContent.includes('the checkpoint is saved')")
    assert status.inner_text().startswith("stopped at step ") and (tmp_path / "work" / "run").is_file()

    # Attention: two panels; another head, another layer, another picture.
    assert page.locator(".the-attention rect").count() == 2 * 12 * 12
    pictures = [looks(page, "the-attention")]
    for slider in ("head", "layer", "example"):
        move(page, "the-attention", slider)
        pictures.append(looks(page, "the-attention"))
    assert len(set(pictures)) == 4

    # From key to picture, kernel and drawing together: the quickest of several, since a test shares its cores.
    times = [redraw(page, "the-attention", "head", key) for key in ("ArrowLeft", "ArrowRight") * 3]
    print("redrawn in", *(f"{ms:.0f}" for ms in times), "ms")
    assert min(times) < 300

    # A prompt: the mark moves with the position, and pressing a button adds the scores.
    marked = page.locator(".the-prompts mark")
    words, picture = marked.inner_text(), looks(page, "the-prompts")
    assert words and page.locator(".the-prompts tbody tr").count() == 5
    page_words = page.locator(".the-prompts p bdi").all_inner_texts()
    move(page, "the-prompts", "position")
    assert marked.inner_text() == page_words[2] and words == page_words[1] and looks(page, "the-prompts") != picture
    page.locator(".the-prompts button", has_text="judge").click()
    page.locator(".the-prompts th", has_text="score").wait_for()

    # The map: a point says its text when hovered, and text that looks like mark-up is text.
    last = page.locator(".the-map circle").last
    last.hover()
    assert last.evaluate("e => e.matches(':hover')")
    assert last.locator("title").evaluate("e => e.textContent") == "<b class=smuggled>&amp;</b>"
    assert page.locator(".smuggled").count() == 0 and page.locator(".the-map circle").count() == 21
    picture = looks(page, "the-map")
    page.locator(".the-map select").select_option("pos")
    page.wait_for_function("() => document.querySelector('.the-map circle[fill-opacity=\"0.12\"]') !== null")
    assert looks(page, "the-map") != picture
    if shots := os.environ.get("DISTILLKIT_SCREENSHOTS"):  # a folder to look at
        page.screenshot(path=Path(shots) / "widgets.png", full_page=True)
