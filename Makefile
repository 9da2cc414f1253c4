# make demo: environment, installation, and a small language model trained on this machine. make test: the tests.
# With a GPU, install without the constraint instead: pip install .

PYTHON ?= python3
BIN := .venv/bin
CMAKE_PYTHON = -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test rehearse gpu bench lint native sanitize mutate architectures clean

demo: .venv/user
	$(BIN)/fastlm pretrain --compile

# Two at a time, one thread each; the tests of one file stay together, as they share what is slow to make.
test: .venv/developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# On a machine with a GPU, torch, triton, numpy, pytest and pytest-benchmark: five parts of at most 9 minutes each, into
# bench/results (python -m bench.scripts.gpu --part NAME: one of them). Nothing is installed. Without a GPU: a rehearsal, small.
gpu:
	$(PYTHON) -m bench.scripts.gpu

# Every command on a stand-in GPU, with the CUDA build of PyTorch in an environment of its own (5 GB): about 12 minutes.
rehearse:
	$(PYTHON) tests/gpuless/rehearse.py

# Every benchmark that runs on this machine, the peers installed first: about 40 minutes on two slow cores. Where a target was
# missed it fails, but after the rest.
bench: .venv/developer
	$(INSTALL) '.[bench]'
	$(BIN)/python -m pytest bench --benchmark; missed=$$?; \
	$(BIN)/python -m bench.scripts.cpu_scale && $(BIN)/python -m bench.scripts.write_page && exit $$missed

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

# The native CPU kernels, built beside their sources; an editable install does the same once.
native: .venv/developer
	$(BIN)/cmake -S . -B build/native -G Ninja $(CMAKE_PYTHON) -DFASTLM_IN_TREE=ON
	$(BIN)/cmake --build build/native

# The native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
RUNTIMES = $$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)
sanitize: .venv/developer
	$(BIN)/cmake -S . -B build/sanitize -G Ninja $(CMAKE_PYTHON) -DFASTLM_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests/kernels $(BIN)/python -m pytest -q -p sanitized \
		-p no:cacheprovider -k native tests/kernels

# Each kernel in each width, dtype and architecture through the compilers: a few minutes.
architectures: .venv/developer
	$(BIN)/python -m pytest -q --noconftest -p no:cacheprovider -n 2 tests/kernels/compiled/every_configuration.py

# Do the kernel tests notice? Plants one fault after the other in a copy of the project and runs them there: 4 to 30 minutes.
mutate: .venv/developer
	$(BIN)/python tests/mutate.py

clean:
	rm -rf .venv build dist kernels/_native*.so
