# One command each, from a fresh clone: the first one that needs it builds .venv, later ones install nothing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test processes next to each other. Every one of them, and every kernel, computes on one thread.
JOBS   ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-avx2 notebooks lab answers slides handout lint clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## build .venv: pinned dependencies and this package, editable

# The stamp is written last: an interrupted installation is taken up again, a finished one is left alone
# until the dependencies themselves change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "distillkit needs Python 3.11 or newer, and $(PYTHON) is not: name one, as in 'make setup PYTHON=python3.12'" >&2; \
	    exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) -m venv failed; on Debian and Ubuntu it is in the package python3-venv" >&2; \
	    rm -rf $(VENV); exit 1; }
	@echo "Installing into $(VENV) (once; a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --quiet -c constraints.txt -e '.[offline,models,notebooks,browser,test]'
	@touch $@

demo: $(STAMP)  ## distil the offline corpus, print the table, draw runs/quickstart.png
	@$(BIN)/python -m distillkit demo

# refresh.py --tier prints --nbval (compare outputs) where the pinned versions are installed, else --nbval-lax.
test: lint  ## every test and every notebook
	@tier=$$($(BIN)/python notebooks/refresh.py --tier) && \
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TQDM_DISABLE=1 \
	    $(BIN)/python -m pytest -n $(JOBS) --dist loadscope $$tier --nbval-current-env tests notebooks

# What lies near a tolerance can differ with the instructions of a processor. make test takes those of the machine.
NUMERIC := tests/test_inner.py tests/test_metagrad.py tests/test_matching.py tests/test_influence.py tests/test_students.py \
           tests/test_language_models.py tests/test_evaluation.py tests/test_merging.py tests/test_training.py

test-avx2: $(STAMP)  ## the numeric tests and every notebook, with AVX2 instructions only
	@tier=$$($(BIN)/python notebooks/refresh.py --tier) && \
	ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TQDM_DISABLE=1 \
	    $(BIN)/python -m pytest -n $(JOBS) --dist loadscope $$tier --nbval-current-env $(NUMERIC) notebooks

notebooks: $(STAMP)  ## execute the notebooks and write their outputs
	@$(BIN)/python notebooks/refresh.py

lab: $(STAMP)  ## open the course in JupyterLab; STUDENT=1: a copy without answers, in course/
ifdef STUDENT
	@$(BIN)/python notebooks/course.py student
	@$(BIN)/jupyter lab course
else
	@$(BIN)/jupyter lab notebooks
endif

slides: $(STAMP)  ## every lesson as slides, in course/
	@$(BIN)/python notebooks/course.py slides

answers: $(STAMP)  ## every lesson with the code of its answers, executed, in course/
	@$(BIN)/python notebooks/course.py answers

handout: $(STAMP)  ## the paper of lesson 10 for printing, in course/
	@$(BIN)/python notebooks/course.py handout

lint: $(STAMP)  ## ruff over code and notebooks
	@$(BIN)/ruff check --quiet .

clean:  ## remove the environment and everything that can be made again
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
