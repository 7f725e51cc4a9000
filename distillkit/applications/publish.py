"""A distilled set as something to pass on: a folder that anybody can read, and the same on the Hugging Face hub.

A published folder holds three things.  ``data/train.parquet`` is the set as a ``datasets.Dataset``: its text with labels
where it has text, else the labels alone; ``datasets.load_dataset(folder)`` reads it, and distillkit need not be installed.
``set.safetensors`` is the set itself (:meth:`~distillkit.core.distilled.DistilledSet.save`), embeddings, step sizes and recipe
included.  ``README.md`` is a dataset card (Gebru et al., 2021, "Datasheets for datasets", in short) made from
what the set's ``meta`` says about how it came to be.  A card says what is known: nothing in it is guessed, and what nobody
wrote down is *not recorded*.

``SHA256SUMS`` lists every file that is read back, so that ``sha256sum -c SHA256SUMS`` checks a download too.  The card is
left out of it, since cards are edited on the hub.  Names and texts come from corpora and from other people's folders, so
in a card they stand as character references: no HTML, mark-up, link or formula of theirs takes effect.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distillkit.core.distilled import DistilledSet
from distillkit.core.loading import MINILM_HUB_ID, MINILM_SHA256
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.evaluation.evaluate import Evaluation
from distillkit.io.checks import require
from distillkit.io.escaping import markdown as escaped
from distillkit.io.files import read_header
from distillkit.io.storage import StorageError, absolute, replacing, save_text, unwritten
from distillkit.io.verify import SUMS, check_sums, read_sums, sha256_of

CARD, ROWS, SET = "README.md", "data/train.parquet", "set.safetensors"
CHECKED = (ROWS, SET)
NOT_RECORDED = "not recorded"
SHOWN, LONGEST = 8, 200  # examples in a card, and characters of one

if TYPE_CHECKING:
    import datasets  # a second to import, and not installed everywhere

Scores = Mapping[str, Evaluation]


# --- the folder ------------------------------------------------------------------------------------------------------


def rows(distilled: DistilledSet) -> datasets.Dataset:
    """The set as a Dataset: :meth:`DistilledSet.to_text` where it has text; else one row an example of what can be read.

    Free embeddings have no words, so their rows hold ``example`` (the index into the tensors), ``tokens`` (its length), and
    ``label`` with ``probabilities``, or ``response``.  Raises ValueError where ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("a published set is written by the package datasets, which is not installed; install it: pip install "
                         "datasets") from error
    if _has_text(distilled):
        return distilled.to_text()
    columns = {"example": list(range(len(distilled))), "tokens": distilled.mask.sum(1).tolist()}
    if "responses" in distilled.meta:
        return datasets.Dataset.from_dict(columns | {"response": distilled.meta["responses"]})
    columns["label"] = distilled.label_names()
    return datasets.Dataset.from_dict(columns | {"probabilities": distilled.probabilities().tolist()})


def save_published(
    distilled: DistilledSet, folder: str | Path, *, evaluations: Scores | None = None, task: Task | None = None,
    student: Student | None = None, license: str | None = None, corpus_license: str | None = None,
) -> Path:
    """Write ``folder`` as it would stand on the hub: card, Dataset, safetensors, sums.  An earlier one is replaced.

    Every file is replaced in one atomic step, and the set has its own SHA-256 in it.  Meanwhile ``SHA256SUMS`` lists the
    earlier table and the new one, so that the folder can be read at every moment, and after a kill.

    Args:
        evaluations: scores for the card, by what they were taken on, such as ``{"test split, bert-base-uncased": score}``.
        task, student: what the set was made with, for what it does not carry itself: where the corpus came from, and the
            base model's revision.
        license: of the set, as the hub writes it, such as ``"cc-by-4.0"``; None: not recorded.
        corpus_license: of the corpus, in words.

    Raises:
        ValueError: ``task`` or ``student`` is another than the set was made with.
        StorageError: something else stands at ``folder``, or in it; or it cannot be written.
    """
    folder, table = absolute(folder), io.BytesIO()
    text = card(distilled, folder.name, evaluations=evaluations, task=task, student=student, license=license,
                corpus_license=corpus_license)
    try:
        earlier = _lines_of_earlier(folder)
        rows(distilled).to_parquet(table)
    except OSError as error:
        raise unwritten(folder, error) from error
    line = f"{hashlib.sha256(table.getbuffer()).hexdigest()}  {ROWS}\n"
    save_text(folder / SUMS, earlier + line)
    with replacing(folder / ROWS) as file:
        file.write(table.getbuffer())
    distilled.save(folder / SET)
    save_text(folder / CARD, text)
    save_text(folder / SUMS, f"{line}{sha256_of(folder / SET)}  {SET}\n")
    return folder


def _lines_of_earlier(folder: Path) -> str:
    """The sums of the table that is published in a folder; StorageError if something else is there."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return ""
    sums = read_sums(folder) if (folder / SUMS).is_file() else {"": set()}
    require({*sums} <= {*CHECKED}, f"will not overwrite {folder}: it is no published set of this version of distillkit; choose "
            "another folder, or delete this one yourself", StorageError)
    return "".join(f"{digest}  {ROWS}\n" for digest in sorted(sums[ROWS]))


def load_published(folder: str | Path) -> DistilledSet:
    """Read a folder that :func:`save_published` wrote, or a download of it.

    Raises:
        StorageError: a file is missing, a link, or differs from its SHA-256; named in the message.
    """
    folder = absolute(folder)
    if (folder / "set").is_dir():
        read_header(folder / "set")  # says which version reads it
    check_sums(folder, [ROWS])
    return DistilledSet.load(folder / SET)


# --- the hub ---------------------------------------------------------------------------------------------------------


def push_to_hub(distilled: DistilledSet, repo_id: str, *, private: bool = True, **about) -> str:
    """Put a set on the Hugging Face hub as a dataset repository; returns the address of the commit.

    Args:
        repo_id: ``"owner/name"``; made if it is not there.
        private: whether a repository that is made is private: until you have seen whether the corpus' licence allows more.
        about: ``evaluations``, ``task``, ``student``, ``license``, ``corpus_license`` as :func:`save_published` takes them.

    Raises:
        ValueError: ``repo_id`` can name no repository.
        ConnectionError: the hub did not take it; says what it answered.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    _check_name(repo_id)
    validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_published(distilled, Path(scratch) / repo_id.split("/")[1], **about)
        api = HfApi()
        try:
            api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder,
                                       commit_message="A distilled set")
        except OSError as error:  # every error of huggingface_hub about the network or a permission is one
            raise ConnectionError(
                f"could not push to {repo_id}: {error}; log in ('hf auth login') with a token that may write there, or "
                "save_published() to a folder and upload that later"
            ) from error
    return str(commit.commit_url)


def from_hub(repo_id: str, revision: str | None = None) -> DistilledSet:
    """A set that :func:`push_to_hub` put on the hub, or that lies in the hub's cache on this machine.

    Args:
        repo_id: ``"owner/name"``.
        revision: branch, tag or commit; name a commit to be sure of the same bytes for ever.

    Raises:
        FileNotFoundError: there is no such repository or revision, or the hub cannot be reached and the cache has it not.
        StorageError: it is no published set, or a file of it is damaged.
    """
    from huggingface_hub import snapshot_download

    _check_name(repo_id)
    names = (SUMS, *CHECKED)
    try:
        found = snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(names))
    except OSError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"no set {repo_id}{at} on the Hugging Face hub or in its cache: {error}; check the name, log "
                                "in if it is private, or copy the folder and use load_published()") from error
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for name in names:  # the cache holds links, which load_published does not follow
            source, target = Path(found) / name, Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                shutil.copyfile(source, target)
        try:
            return load_published(scratch)
        except StorageError as error:
            raise StorageError(f"{repo_id} on the hub: {str(error).replace(scratch, str(found))}") from error


def _check_name(repo_id: str) -> None:
    if not isinstance(repo_id, str) or not re.fullmatch("[^/]+/[^/]+", repo_id):
        raise ValueError(f"repo_id must be 'owner/name', not {repo_id!r}")


# --- the card --------------------------------------------------------------------------------------------------------


def card(
    distilled: DistilledSet, title: str, *, evaluations: Scores | None = None, task: Task | None = None,
    student: Student | None = None, license: str | None = None, corpus_license: str | None = None,
) -> str:
    """The dataset card of a set as Markdown with YAML in front; arguments as of :func:`save_published`."""
    meta = distilled.meta
    makers = {"task": (meta.get("task_fingerprint"), task and task.fingerprint),
              "student": (meta.get("student"), student and student.name)}
    for name, (recorded, current) in makers.items():
        if recorded is not None and current not in (None, recorded):
            raise ValueError(f"{name}: the set was made with another one ({recorded!r}) than was given ({current!r}); a card "
                             "must not mix them, so give the one it was made with, or none")
    if student is not None:
        distilled.check_table(student)
    front = {
        **({"license": license} if license else {}),
        "pretty_name": " ".join(title.split()),
        "tags": ["distillkit", "dataset-distillation"],
        "task_categories": ["text-generation" if "responses" in meta else "text-classification"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": ROWS}]}],
    }
    examples = "prompts with responses" if "responses" in meta else "labelled examples"
    form = "as text" if _has_text(distilled) else "as learned input embeddings, which have no text"
    recipe = json.dumps(meta["recipe"], indent=1) if meta.get("recipe") else "none: it was not distilled, or its recipe is lost"
    facts = _facts(distilled, task, student, license, corpus_license)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=False)}---",
        f"# {escaped(title)}",
        f"{len(distilled)} {examples} to train on in place of a corpus, {form}. Made with distillkit. This card says what the "
        f"set itself recorded; what is missing is *{NOT_RECORDED}*.",
        "## How it was made",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
        "## Recipe",
        "What training on it means, step by step:",
        f"```json\n{recipe}\n```",
        "## Scores",
        _scores(evaluations),
        "## Examples",
        _examples(distilled),
        "## Use",
        _use(distilled),
        "## What it is not good for",
        _limits(distilled, evaluations, license),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(distilled: DistilledSet, task, student, license: str | None, corpus_license: str | None) -> dict[str, Any]:
    """What is known of how a set was made."""
    meta = distilled.meta
    offline = f"{MINILM_HUB_ID} (offline:minilm; weights with SHA-256 {MINILM_SHA256})"
    return {
        "method": _method(meta),
        "base model": offline if meta.get("student") == "offline:minilm" else meta.get("student"),
        "base model's revision": _revision(student),
        "embedding table (SHA-256)": meta.get("table_sha256"),
        "corpus": meta.get("task"),
        "corpus' fingerprint (SHA-256)": meta.get("task_fingerprint"),
        "corpus came from": task and task.origin,
        "corpus' licence": corpus_license,
        "licence of this set": license,
        "classes": ", ".join(meta.get("classes", ())),
        "size": f"{len(distilled)} examples of at most {distilled.embeds.shape[1]} tokens; {distilled.nbytes:,} bytes to "
                "train on",
        "seeds": _seeds(meta),
    }


def _cell(value) -> str:
    return escaped(value) if value not in (None, "", ()) else NOT_RECORDED


def _has_text(distilled: DistilledSet) -> bool:
    return distilled.tokens is not None and "text" in distilled.meta


def _method(meta: Mapping) -> str:
    """What was done to a set, in the order it was done, in words."""
    steps = [f"{key}: {meta[key].get('method', meta[key].get('judge', NOT_RECORDED))}"
             for key in ("selection", "search") if key in meta]
    if recipe := meta.get("recipe"):
        learned = ", ".join(recipe.get("distiller", {}).get("learn", ()))
        steps.append(f"distilled by {recipe.get('objective', NOT_RECORDED)}" + (f" (learned: {learned})" if learned else ""))
    if "projection" in meta:
        steps.append(f"projected to the nearest tokens ({meta['projection'].get('metric', NOT_RECORDED)})")
    if "retokenized" in meta:
        steps.append(f"tokenised again, from {meta['retokenized'].get('from', NOT_RECORDED)}")
    return "; then ".join(steps)


def _revision(student: Student | None) -> str | None:
    """The commit that a hub model was loaded at, as the hub's cache names it; of a folder nothing is known."""
    if student is None or Path(student.name).exists() or student.module.config.name_or_path != student.name:
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(student.name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def _seeds(meta: Mapping) -> str:
    sources = {"distilling": meta.get("recipe", {}).get("distiller", {}), "selection": meta.get("selection", {}),
               "search": meta.get("search", {})}
    return ", ".join(f"{name} {source['seed']}" for name, source in sources.items() if source.get("seed") is not None)


def _scores(evaluations: Scores | None) -> str:
    if not evaluations:
        return f"*{NOT_RECORDED}*"
    lines = ["| scored on | recipe | steps | optimiser | accuracy (mean ± sd) | fresh seeds |", "|---|---|---:|---|---:|---:|"]
    for where, one in evaluations.items():
        optimizer = one.recipe.get("optimizer") or {}
        rate = f", step size {optimizer['step_size']:g}" if one.recipe["name"] != "own" and "step_size" in optimizer else ""
        lines.append(f"| {_cell(where)} | {_cell(one.recipe['name'])} | {_cell(one.recipe.get('steps'))} | "
                     f"{_cell(optimizer.get('name'))}{rate} | {one.score_text()} | {len(one.scores)} |")
    return "\n".join(lines) + (
        "\n\nEach score is that of models trained afresh on this set alone, by the recipe of its row: *own* is the one above, "
        "*standard* AdamW fine-tuning with published settings, *tuned* the best of one AdamW grid judged on validation text."
    )


def _examples(distilled: DistilledSet) -> str:
    if not _has_text(distilled):
        return "None can be shown: learned embeddings have no text."
    texts = distilled.to_text()
    titles = [name for name in ("label", "text", "prompt", "response") if name in texts.column_names]
    table = [titles, ["---"] * len(titles)]
    table += [[escaped(row[name], LONGEST) for name in titles] for row in texts.select(range(min(SHOWN, len(texts)))).to_list()]
    more = f"\n\n{len(texts) - SHOWN} more in `{ROWS}`." if len(texts) > SHOWN else ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + more


def _use(distilled: DistilledSet) -> str:
    with_kit = "import distillkit as dk\n\ndistilled = dk.from_hub(\"owner/name\")   # every byte is checked"
    tensors = f"from safetensors.torch import load_file\n\ntensors = load_file(\"{SET}\")   # embeds [m, l, d], mask"
    plain = "from datasets import load_dataset\n\nrows = load_dataset(\"owner/name\", split=\"train\")   # without distillkit"
    return "\n\n".join(f"```python\n{code}\n```" for code in (with_kit, plain if _has_text(distilled) else tensors))


def _limits(distilled: DistilledSet, evaluations: Scores | None, license: str | None) -> str:
    meta, text = distilled.meta, _has_text(distilled)
    learned = bool(meta.get("recipe"))
    limits = [
        (learned, "Other recipes. It was learned for the one above; what it is worth under another is what the table of scores "
         "says, and unknown where that says nothing."),
        (text and (learned or "search" in meta), "Reading. Its words were chosen because a model trains well on them, not "
         "because they are true or make sense."),
        (text and not learned and "search" not in meta, "Hiding the corpus. No recipe is recorded, so take its sentences for "
         "ones of the corpus, whose licence and privacy hold for them."),
        (not text, f"Other models. Its embeddings, {distilled.embeds.shape[-1]} wide, belong to the base model's embedding "
         "table; no other model and no person can read them."),
        (meta.get("classes"), f"Other labels than its {len(meta.get('classes', ()))} classes, and other kinds of text than its "
         "corpus."),
        (not meta.get("classes"), "Other kinds of questions than those of its corpus."),
        (True, "Privacy. It began as real rows of the corpus; how much of them can be got back was not measured."),
        (not evaluations, "Any claim about accuracy: no score was recorded."),
        (not license, "Passing on, before its licence is settled: none is recorded."),
    ]
    return "\n".join(f"* {limit}" for applies, limit in limits if applies)
