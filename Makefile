# make demo: environment, installation, and a small language model trained on this machine. make test: the tests.
# With a GPU, install without the constraint instead: pip install .

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test lint native sanitize clean

demo: .venv/user
	$(BIN)/fastlm pretrain --compile

test: .venv/developer
	$(BIN)/python -m pytest

lint: .venv/developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

.venv/user: pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/native/*)
	@echo "Installing fastlm and its dependencies into .venv (about 3 minutes the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(INSTALL) .
	@touch $@

.venv/developer: .venv/user
	@echo "Installing the developers' tools into .venv"
	@$(INSTALL) '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist kernels/_native*.so
