"""The course in other forms: without answers, as slides, on Colab."""

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest

EXERCISE = "### Exercise 1 (read)\n\nWhy?\n\n<details><summary>Answer</summary>\n\nBecause.\n</details>\n\nGo on."
TABLE = "<details><summary>All rows</summary>\n\nMany.\n</details>"
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.fixture(scope="module")
def course():
    """The module notebooks/course.py, which imports its neighbour refresh.py."""
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("distillkit_course", FOLDER / "course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def lesson(folder, name="00_lesson.ipynb"):
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# 00 A lesson"),
        v4.new_code_cell("print(42)", execution_count=1, outputs=[v4.new_output("stream", text="42\n")]),
        v4.new_markdown_cell(EXERCISE),
        v4.new_markdown_cell(TABLE),
        v4.new_code_cell("assert 'hidden check'", execution_count=2, metadata={"tags": ["check"]}),
    ]
    nbformat.write(v4.new_notebook(cells=cells), folder / name)
    return folder / name


def test_a_students_copy_has_the_questions_and_neither_answers_nor_outputs(course, tmp_path):
    (tmp_path / "course").mkdir()
    lines = course.write_student([lesson(tmp_path)], tmp_path / "course")
    text = (tmp_path / "course" / "00_lesson.ipynb").read_text(encoding="utf-8")
    assert "Why?" in text and "Go on." in text and "Many." in text and "Because." not in text and "42\\n" not in text
    assert (tmp_path / "course" / "pictures" / "plane.js").is_file(), "lessons import it"
    assert (tmp_path / "course" / "GLOSSARY.md").is_file() and "course/00_lesson.ipynb" in lines[0]


def test_what_a_student_wrote_is_left_alone_unless_asked(course, tmp_path):
    path, copy = lesson(tmp_path), tmp_path / "course" / "00_lesson.ipynb"
    course.write_student([path], tmp_path / "course")
    copy.write_text("my work", encoding="utf-8")
    assert "left alone" in course.write_student([path], tmp_path / "course")[0] and copy.read_text() == "my work"
    course.write_student([path], tmp_path / "course", fresh=True)
    assert "Why?" in copy.read_text(encoding="utf-8")


ANSWERED = """<details><summary>Answer</summary>

Half of it.

```python
print(6 * answered)
```

```python fragment
if fragments ran, this would be an error
```

</details>

```python
not_an_answer
```
"""


def test_the_code_of_answers_runs_behind_its_lesson(course, tmp_path):
    v4 = nbformat.v4
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(ANSWERED), v4.new_code_cell("answered = 7")])
    nbformat.write(notebook, tmp_path / "00_lesson.ipynb")
    course.write_answers([tmp_path / "00_lesson.ipynb"], tmp_path / "course")
    written = nbformat.read(tmp_path / "course" / "00_lesson.answers.ipynb", 4)
    assert [cell.outputs[0].text for cell in written.cells if cell.cell_type == "code" and cell.outputs] == ["42\n"]
    notebook.cells[1].source = "nothing = 7"
    nbformat.write(notebook, tmp_path / "00_lesson.ipynb")
    with pytest.raises(SystemExit, match="00_lesson: an answer .*fails\n"):
        course.write_answers([tmp_path / "00_lesson.ipynb"], tmp_path / "course")


def test_the_code_of_every_answer_is_python(course):
    codes = {path.stem: course.answers(course.read(path)) for path in course.find([])}
    assert sum(map(len, codes.values())) >= 18
    assert all(compile(code, name, "exec") for name, some in codes.items() for code in some)


def test_slides_show_outputs_and_no_checks_or_answers(course, tmp_path):
    course.write_slides([lesson(tmp_path)], tmp_path / "course")
    page = (tmp_path / "course" / "00_lesson.slides.html").read_text(encoding="utf-8")
    assert "reveal" in page and "42" in page and "Why?" in page
    assert "Many." in page and "hidden check" not in page and "Because." not in page


def test_the_handout_has_the_paper_and_keeps_the_verdicts_for_its_last_page(course, tmp_path):
    assert course.main(["handout", "--into", str(tmp_path)]) == 0
    page = (tmp_path / "10_handout.html").read_text(encoding="utf-8")
    paper, objections, verdicts = (page.index(text) for text in ("Table 2", "Fifteen objections", "For the lecturer"))
    assert paper < objections < verdicts
    reasons = [page.index(suspicion.reason) for suspicion in course.reviewing.SUSPICIONS.values()]
    assert len(reasons) == 15 and min(reasons) > verdicts


def test_every_lesson_has_a_students_copy_that_still_asks_for_its_exercises(course, tmp_path):
    course.write_student(course.find([]), tmp_path / "course")
    for path in sorted((tmp_path / "course").glob("*.ipynb")):
        text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
        assert text.count("### Exercise") == 3 and "<summary>Answer" not in text, path.name


def test_a_published_repository_gets_badges_once(course, tmp_path, monkeypatch):
    import refresh

    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/some/body.git"\n')
    assert refresh.repository(project) == "https://github.com/some/body"
    monkeypatch.setattr(refresh, "repository", lambda: "https://github.com/some/body")
    path = lesson(tmp_path)
    notebook = refresh.read(path)
    nbformat.write(notebook, path)
    again = refresh.read(path)
    assert [cell.source for cell in again.cells] == [cell.source for cell in notebook.cells]
    assert "colab.research.google.com/github/some/body/blob/main/notebooks/00_lesson.ipynb" in again.cells[0].source
    assert again.cells[0].source.endswith("# 00 A lesson") and "git" in again.cells[1].source
    compile(again.cells[1].source, "colab", "exec")


def test_without_an_address_there_is_no_badge(course, tmp_path):
    import refresh

    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\n')
    assert refresh.repository(project) is None and refresh.repository(tmp_path / "nothing") is None
