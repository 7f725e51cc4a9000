"""What several test files share."""

import os
import signal

import pytest

os.environ.setdefault("TQDM_DISABLE", "1")
# Under nohup SIGHUP is ignored, and children inherit that: tests that send it would wait for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def standin_home(tmp_path_factory):
    """A Hugging Face home filled with tiny models and data sets; for a subprocess, see `standin_hub.environment`."""
    import standin_hub  # imports transformers and datasets, which most tests need not wait for

    return standin_hub.fill(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture
def standin_hub(standin_home):
    """The stand-in hub in place of the real one, in this process, for one test; gives its Hugging Face home."""
    import standin_hub

    with standin_hub.patched(standin_home) as home:
        yield home


@pytest.fixture(scope="session")
def task(standin_home):
    """The stand-in hub's rotten_tomatoes."""
    import distillkit as dk
    import standin_hub

    with standin_hub.patched(standin_home):
        return dk.load_task("rotten_tomatoes", max_length=12)


@pytest.fixture(scope="session")
def world(task, standin_home):
    """That task and a tiny BERT for it."""
    import distillkit as dk
    import standin_hub

    with standin_hub.patched(standin_home):
        return task, dk.load_student("bert-base-uncased", task)


@pytest.fixture(scope="session")
def docstrings():
    """The real offline corpus, from the user's cache, built there if need be."""
    from distillkit.data.docstrings import docstring_corpus

    return docstring_corpus()
