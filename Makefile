# Set-up is a stamp file: it runs again when the dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e . --group dev
	touch $(STAMP)

demo: $(STAMP)  ## ask the bundled model about bundled clips over HTTP
	$(BIN)/filmstrip demo --once

# The parity tests run Transformers' video processors in a process of their own; those need torchvision, which must stay
# out of the environment that Filmstrip runs in.
$(VENV)/parity/torchvision: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/parity torchvision==0.28.0

test: $(STAMP) $(VENV)/parity/torchvision  ## the whole test suite
	$(BIN)/python -m pytest tests

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .demo
