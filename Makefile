# make demo    train on real data with the fused optimizers, beside mlx.optimizers
# make test    run the tests on every backend that is here
# make metal-check  simulate the Metal kernels and cross-compile for macOS
# make bench        step time, bandwidth, memory and growth beside the peers
# make metal-cost   count bytes and launches on Metal, beside mlx.optimizers
# make sanitize     run the tests under the address, undefined and thread sanitizers
# make soak    100,000 steps beside mlx.optimizers; SOAK="--steps 1000 --seed 7"
# make wheel   build the source distribution, and from it the wheel for this machine
# make wheel-macos  cross-build the wheel for arm64 macOS
# make docs    the documentation, in build/docs
# make lint    ruff, mypy, clang-format and the schema of GitHub's workflows
# make clean   remove what the other targets made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

sources := pyproject.toml CMakeLists.txt README.md $(wildcard cmake/*) \
  $(shell find csrc metal python -type f -not -path '*/__pycache__/*')
simulator_sources := $(shell find tests/metal_simulator -type f -not -path '*/__pycache__/*')
cpp_sources := $(shell find csrc tests -name '*.h' -or -name '*.cpp') $(wildcard metal/*.h metal/*.metal)

.PHONY: demo test simulator metal-check bench metal-cost sanitize soak wheel wheel-macos docs lint format clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/package $(STAMPS)/examples
	$(BIN)/python examples/train_digits.py

test: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/examples $(STAMPS)/lora $(STAMPS)/bench simulator
	$(BIN)/python -m pytest

simulator: $(STAMPS)/simulator

metal-check: $(STAMPS)/package $(STAMPS)/test simulator
	$(BIN)/python tests/metal_check.py

metal-cost: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/bench simulator
	$(BIN)/python -m bench.metal_cost

wheel: $(STAMPS)/build $(STAMPS)/test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation

wheel-macos: $(STAMPS)/build $(STAMPS)/test
	$(BIN)/python tests/cross_compile/cross_compile.py --wheels dist

bench: $(STAMPS)/package $(STAMPS)/bench
	$(BIN)/python -m bench
	$(BIN)/python -m bench.train_step

# -n: a reference that leads nowhere is a warning, -W: a warning an error, -E: afresh.
docs: $(STAMPS)/package $(STAMPS)/docs
	$(BIN)/python -m sphinx -q -n -W --keep-going -E docs build/docs

# SANITIZE_TESTS: pytest's arguments, if not all tests are to run.
sanitize: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/examples
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/sanitize/run.py address $(SANITIZE_TESTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/sanitize/run.py thread $(SANITIZE_TESTS)

soak: $(STAMPS)/package $(STAMPS)/test
	$(BIN)/python tests/soak.py $(SOAK)

lint: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/examples $(STAMPS)/bench $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(cpp_sources)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(cpp_sources)

clean:
	rm -rf $(VENV) build dist

# The build's own requirements, read from where pip would, and CMake and Ninja
# where the machine has none. Installed once: an isolated build would fetch them
# and compile everything anew each time.
$(STAMPS)/build: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python cmake/build_requirements.py | xargs -d '\n' $(BIN)/python -m pip install --quiet
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/package: $(STAMPS)/build $(sources)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

$(STAMPS)/simulator: $(STAMPS)/package $(STAMPS)/test $(simulator_sources)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/simulator -G Ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DMLX_FUSED_SIMULATOR=ON > build/simulator.log
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/simulator >> build/simulator.log
	touch $@

# The extras of pyproject.toml, without building the package again.
$(STAMPS)/test $(STAMPS)/examples $(STAMPS)/lora $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/lint: $(STAMPS)/build
	$(BIN)/python cmake/build_requirements.py $(@F) | xargs -d '\n' $(BIN)/python -m pip install --quiet
	touch $@
