# Two commands on a fresh machine: `make demo` and `make test`. Both do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: demo test lint vowels timit tune-vowels tune-timit clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed  ## a short run of the main job, under 6 minutes on 2 cores
	$(BIN)/avrnn compare --data vowels --seeds 1 --steps 300 --out $(OUT)

test: .venv/.installed  ## the whole suite, under 12 minutes on 2 cores
	$(BIN)/pytest

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs
