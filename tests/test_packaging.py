"""What a fresh clone promises: dependency files agree, commands exist, the import is light, nothing is private."""

import re
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"]) - {"benchmark", "lm-eval"}  # other people's code, to compare with
MAKE_TARGETS = {"help", "setup", "demo", "test", "test-avx2", "notebooks", "lab", "answers", "slides", "handout", "lint",
                "clean"}

# Paths that exist on one person's machine only, and options that send an installation to one index.
PRIVATE_PATH = re.compile(r"(?<![\w.~])/(?:home|Users|root|work|tmp|opt|mnt|srv)/[\w.-]+|[A-Z]:\\Users\\")
REGISTRY = re.compile(
    r"pypi\.org/simple|files\.pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|repo\.anaconda\.com"
    r"|artifactory|--(?:extra-)?index[-]url|--find[-]links|--trusted[-]host",
    re.IGNORECASE,
)


def pins() -> dict[str, str]:
    """Return package -> version of constraints.txt, having checked that every line pins exactly one version, once."""
    versions: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert pin, f"constraints.txt: not 'name==version' (without build suffix): {line!r}"
            name = canonicalize_name(pin[1])
            assert name not in versions, f"constraints.txt pins {name} twice"
            versions[name] = pin[2]
    return versions


def requirements() -> list[Requirement]:
    """Return every requirement of pyproject.toml, those of the extras included."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in PROJECT["dependencies"] + [text for extra in extras for text in extra]]


def conda() -> tuple[list[str], list[str]]:
    """Return the conda and the pip dependencies of environment.yml."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    plain = [entry for entry in dependencies if isinstance(entry, str)]
    return plain, next(entry["pip"] for entry in dependencies if isinstance(entry, dict))


def repository_files() -> list[Path]:
    """Return the files that are, or would be, committed; skips where this is not a git work tree (a source archive)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git work tree")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_floor(requirement):
    pinned = pins().get(canonicalize_name(requirement.name))
    assert pinned, f"constraints.txt does not pin {requirement.name}"
    assert pinned in requirement.specifier, f"constraints.txt pins {pinned}, pyproject.toml says {requirement}"
    assert any(s.operator == ">=" for s in requirement.specifier), f"pyproject.toml: no floor for {requirement.name}"


def test_constraints_are_sorted():
    names = list(pins())
    assert names == sorted(names), "sort constraints.txt by name, so that a change of versions is a readable diff"


def test_pins_install_on_the_oldest_python_that_is_promised():
    (floor,) = (s.version for s in SpecifierSet(PROJECT["requires-python"]) if s.operator == ">=")
    refused, seen = [], 0
    for name, pinned in pins().items():
        try:
            package = metadata(name)
        except PackageNotFoundError:  # not installed here, as what an extra needs
            continue
        if package["Version"].split("+")[0] == pinned:
            seen += 1
            if not SpecifierSet(package["Requires-Python"] or "").contains(f"{floor}.0"):
                refused.append(f"{name} {pinned} wants Python {package['Requires-Python']}")
    if not seen:
        pytest.skip("none of the pinned versions is installed")
    assert not refused


def test_conda_installs_this_package_with_the_same_pins():
    plain, pip = conda()
    assert "-c constraints.txt" in pip
    editable = next(entry for entry in pip if entry.startswith("-e "))
    extras = Requirement("distillkit" + editable.removeprefix("-e .")).extras
    assert extras == EXTRAS
    assert set(pip) == {"-c constraints.txt", editable}, "versions belong in constraints.txt"
    assert any(entry.split()[0] == "pip" for entry in plain)


def test_conda_versions_contradict_nothing():
    versions = pins()
    for entry in conda()[0]:
        requirement = Requirement(entry)
        pinned = versions.get(canonicalize_name(requirement.name))
        assert pinned is None or pinned in requirement.specifier, f"environment.yml {entry!r} against the pin {pinned}"
    python = next(Requirement(entry) for entry in conda()[0] if entry.split()[0] == "python")
    supported = SpecifierSet(PROJECT["requires-python"])
    for minor in range(30):
        if f"3.{minor}" in python.specifier:
            assert f"3.{minor}" in supported, f"environment.yml admits Python 3.{minor}, pyproject.toml does not"


def test_make_installs_with_the_same_pins_and_every_extra():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    install = next(line for line in text.splitlines() if "pip install" in line)
    assert "-c constraints.txt" in install
    assert set(re.search(r"-e '\.\[(.*)]'", install)[1].split(",")) == EXTRAS


def test_make_has_its_targets_and_explains_them():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([a-z0-9-]+):.*## ", text, re.MULTILINE))
    assert explained == MAKE_TARGETS
    assert set(re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)[1].split()) == MAKE_TARGETS


def test_continuous_integration_runs_make_test():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert "make test" in script


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "distillkit/py.typed", "distillkit/__init__.py"])
def test_the_files_that_packaging_needs_are_there(name):
    assert (ROOT / name).is_file()


def test_the_installed_metadata_are_these():
    assert version("distillkit") == PROJECT["version"]


def test_importing_takes_three_seconds_at_most():
    """The best of three: the first may read cold files, and other tests run at the same time."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import distillkit"], check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 3.0, f"importing distillkit took {seconds} s: import heavy libraries where they are used"


def test_nothing_private_is_in_the_repository():
    """No absolute path of somebody's machine and no package registry: the reader has other ones."""
    private = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content[:8192] or path == Path(__file__).resolve():
            continue  # a picture or weights; or this file, whose patterns match themselves
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if '"image/png": "' not in line:
                hits = [hit[0] for pattern in (PRIVATE_PATH, REGISTRY) if (hit := pattern.search(line))]
                private += [f"{path.relative_to(ROOT)}:{number}: {hit}" for hit in hits]
    assert not private, "\n".join(private)
