"""What the README and the page of results print is what the committed results say, and the README's code runs."""

import ast
import builtins
import re
from pathlib import Path

import pytest

import distillkit as dk
from benchmarks import attention_labels
from benchmarks import metagrad as benchmark
from distillkit.experiments.kinds import table_of
from distillkit.experiments.results import MARKED, by_set, read, with_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "figures" / "results"
PAGES = {ROOT / "README.md": {"quickstart"}, RESULTS.parent / "RESULTS.md": {"classification_docstrings", "metagrad"}}
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_tables_are_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    names = [name for marker in MARKED.finditer(text) for name in marker[3].split()]
    assert PAGES[page] <= set(names)
    assert all((RESULTS / f"{name}.json").is_file() for name in names)
    assert with_tables(text, RESULTS, marker="table", draw=table_of) == text, "run: python -m distillkit readme"
    drawn = with_tables(text, RESULTS, marker="benchmark", draw=benchmark.tables)
    assert drawn == text, "run: python tests/benchmarks/metagrad.py --readme"
    drawn = with_tables(text, RESULTS, marker="attention", draw=attention_labels.table)
    assert drawn == text, "run: python tests/benchmarks/attention_labels.py --readme"


def test_every_result_has_its_table():
    markers = [marker for page in PAGES for marker in MARKED.finditer(page.read_text(encoding="utf-8"))]
    shown = {name for marker in markers for name in marker[3].split()}
    assert {path.stem for path in RESULTS.glob("*.json")} == shown


def test_the_glossary_tells_the_runs_apart_by_their_committed_numbers():
    text = (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8")
    row = r"^\| `(?:make |python -m distillkit run )(\w+)`.*\| (\d+) \| (\d\.\d+) \| (\d\.\d+)? ?\|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 5
    for name, sets, *printed in rows:
        cell = "per_class=1" if name.startswith("evidence_") else {"steps_docstrings": "base"}.get(name)
        scores = by_set(read(RESULTS / f"{name.replace('demo', 'quickstart')}.json"), cell=cell)
        for method, number in zip(("embeddings/own", "projected/own"), printed, strict=True):
            if number:
                assert f"{scores.loc[method].mean():.2f}" == number, (name, method)
        assert scores.loc["embeddings/own"].count() == int(sets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    assert links
    assert not [link for link, _ in links if not (page.parent / link).exists()]
    for link, place in links:
        if place:
            heads = re.findall(r"^#+ (.*)$", (page.parent / link if link else page).read_text(encoding="utf-8"), re.MULTILINE)
            assert place in {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}, place


def test_its_first_code_runs(standin_hub, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace('"docstrings", max_length=32', '"rotten_tomatoes", max_length=12')
    code = code.replace('"offline:minilm"', '"bert-base-uncased"').replace("length=32", "length=8")
    code = code.replace("run(60)", "run(2)").replace("batch_size=48", "batch_size=8")
    exec(code, {})
    printed = capsys.readouterr().out
    assert "own" in printed
    assert printed.startswith("1 ")


def test_its_code_uses_no_name_that_is_defined_nowhere_above():
    known, used = set(dir(builtins)), []
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        nodes = list(ast.walk(ast.parse(block)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        known |= {alias.asname or alias.name for node in imports for alias in node.names}
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        used += [node.id for node in names if isinstance(node.ctx, ast.Load) and node.id not in known]
    assert used == []


def test_its_code_for_instruction_tuning_runs(standin_hub, capsys, tmp_path):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "record_experts" in block)
    less = {'"docstrings_qa:library", max_length=96': '"arc_easy", max_length=48', '"offline:tiny-opt"': '"facebook/opt-1.3b"',
            '"runs/experts"': repr(str(tmp_path)), "fraction=0.05": "fraction=0.2", "Unroll(8,": "Unroll(2,",
            "batch_size=64": "batch_size=16", "run(40)": "run(2)"}
    for old, new in less.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, {"dk": dk})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 {'outer'") and lines[1].startswith("2 ") and "neighbor" in lines[1] and "own" in lines[2]
