# The two commands of the README, `make train` and `make test`, set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= smoke
TOKENIZER ?= bpe:4096

.PHONY: setup train test test-long test-cluster release-check matrix soak lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("lmscale needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; use make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The default run reads the source text of the Python standard library, which needs no network.
data/smoke/manifest.json: | setup
	$(BIN)/python tools/stdlib_corpus.py data/stdlib.jsonl
	$(BIN)/lmscale prepare data/smoke data/stdlib.jsonl --tokenizer $(TOKENIZER) \
		--heldout 5% --chunk-tokens 65536

ifeq ($(CONFIG),smoke)
train: setup data/smoke/manifest.json
else
train: setup
endif
	$(BIN)/lmscale train $(CONFIG)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Workers share the cores where a test waits or uses one, a file each: its tests share what they compare with. Tests of
# many ranks fill the cores alone.
# The seed of every random choice, which all workers must agree on; set it to the one that was printed to do it again.
ifndef LMSCALE_TEST_SEED
LMSCALE_TEST_SEED := $(shell od -An -N2 -tu2 /dev/urandom | tr -d ' ')
endif
export LMSCALE_TEST_SEED
WORKERS := --dist loadfile -n

test: setup
	@echo LMSCALE_TEST_SEED=$(LMSCALE_TEST_SEED)
	$(BIN)/pytest $(WORKERS) 3 tests/unit tests/e2e --durations=15
	$(BIN)/pytest tests/arch tests/distributed tests/gradients --durations=15

test-long: setup
	@echo LMSCALE_TEST_SEED=$(LMSCALE_TEST_SEED)
	$(BIN)/pytest -m 'slow and not gpu and not cluster' $(WORKERS) 2 tests/unit tests/e2e --durations=15
	$(BIN)/pytest -m 'slow and not gpu and not cluster' tests/distributed tests/gradients --durations=15

# A real Slurm cluster of four nodes on this machine: needs root and the packages that README.md names.
test-cluster: setup
	$(BIN)/pytest -m cluster tests/cluster --durations=15 -rs

# What must hold before a release but not at every change: the gradient table was measured on this code.
release-check: setup
	$(BIN)/pytest -m release tests/gradients

# The long matrices, whole and resumable; their tables go to docs/.
soak: setup
	LMSCALE_TEST_WHOLE=1 $(BIN)/pytest -m slow tests/unit/corpus
	$(BIN)/python tools/kills_in_a_row.py
	$(BIN)/python tools/soak.py

# Within the hour together; run again, each goes on where it stopped.
matrix: setup
	$(BIN)/python tools/gradient_matrix.py --minutes 30
	$(BIN)/python tools/gradient_matrix.py --mutations
	$(BIN)/python tools/matrix.py --minutes 24
	LMSCALE_TEST_WHOLE=1 $(BIN)/pytest -m slow tests/e2e/test_earlier_version.py
	$(MAKE) release-check

clean:
	rm -rf $(VENV) data/smoke data/stdlib.jsonl
