# make demo    fine-tune a real small model and show what changed
# make test    install and run the tests
# make check   lint and types
# make docs    build the documentation site into site/
# make bench   measure speed and memory beside the usual trainers, and overhead (not run in CI)
#              make bench ARGS=--quick, or ARGS="--only seq512,generate --rounds 1"; QLORA_BENCH_DATA=FOLDER adds real chats

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
PEERS  ?= build/peers
CHECK  := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name one: make PYTHON=python3.11")'

.PHONY: demo test check docs bench clean

demo: $(VENV)/.demo
	$(BIN)/qlora demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(PEERS)/.bench
	$(PEERS)/bin/python tests/benchmarks/overhead.py --json build/overhead.json
	$(PEERS)/bin/python tests/benchmarks/compare.py --json build/bench.json $(ARGS)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

# A stamp for each set of extras, so that nothing is installed twice.
$(VENV)/.%: pyproject.toml constraints.txt
	@$(CHECK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[$*]'
	@touch $@

# The peers have an environment of their own: what is measured is what tests/benchmarks/requirements.txt pins.
$(PEERS)/.bench: pyproject.toml constraints.txt tests/benchmarks/requirements.txt
	@$(CHECK)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt -r tests/benchmarks/requirements.txt -e '.[demo]'
	@touch $@

.SECONDARY:
