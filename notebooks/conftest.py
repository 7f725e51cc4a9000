"""How pytest (with nbval) runs the notebooks of this folder: in refresh.py's environment, up to the first error.

nbval starts one kernel a notebook and runs its cells as tests, one after the other. By itself it gives the kernel
whatever environment pytest has, and goes on after an error, so that one broken cell fails every later one that uses its
variables.
"""

import os
from unittest import mock

import pytest

from refresh import environment

_broken: dict = {}  # notebook (a collector) -> name of its first failed cell


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skip the cells below a failed one; else let nbval set up, which starts the kernel, in the fixed environment."""
    if item.parent in _broken:
        pytest.skip(f"{_broken[item.parent]} of this notebook failed")
    with mock.patch.dict(os.environ, environment(reduced=os.environ.get("DISTILLKIT_REDUCED") == "1")):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Remember the first cell of a notebook that raised. One whose output differs has set its variables."""
    report = yield
    if report.failed and "Cell outputs differ" not in str(call.excinfo.value):
        _broken.setdefault(item.parent, item.name)
    return report
