# One way to run everything; CI calls the same targets.
#
#   make demo    two small experts merged in several ways, scored, reported
#   make test    lint, types, tests
#   make bench   the measurements of docs/benchmarks.md
#   make claims  every method on the lab's suites, for docs/claims.md
#   make scale   the arithmetic of very large merges, for docs/scale.md
#   make fault   kills, full disks, damaged and hostile files by the thousand; a few minutes
#   make docs    the generated pages of docs/methods/

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/geomerge.stamp
LOG := $(VENV)/pip.log
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

export HF_HUB_DISABLE_TELEMETRY = 1
# The tests start the program hundreds of times: its modules are compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo test lint bench claims scale fault docs clean

env: $(STAMP)

# Output goes to a log; when something fails its end is shown.
$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard src/geomerge/methods/native/*.[ch]) src/geomerge/methods/native/groups.txt src/geomerge/methods/native/build.py
	@test -n "$(PYTHON)" || { echo "geomerge needs Python 3.11 or newer with the venv module (Debian: python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (log: $(LOG))"
	@{ $(PIP) install "$$(grep '^torch==' constraints.txt)" && $(PIP) install -c constraints.txt -e '.[dev,eval,search,quant]'; } >$(LOG) 2>&1 \
		|| { tail -n 30 $(LOG) >&2; exit 1; }
	@touch $(STAMP)

demo: env
	@$(BIN)/geomerge demo $(DEMO)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: env
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/spectral.py

claims: env
	$(BIN)/python benchmarks/claims.py

scale: env
	$(BIN)/python benchmarks/scale.py

fault: env
	GEOMERGE_FAULTS=many $(BIN)/python -m pytest -n $(WORKERS) tests/test_faults.py tests/test_faults_mutated.py

docs: env
	$(BIN)/python docs/generate.py

clean:
	rm -rf demo build dist .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
