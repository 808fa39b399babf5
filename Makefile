# make demo    train on real data with the fused optimizers, beside mlx.optimizers
# make test    run the tests on every backend that is here; TESTS="-k clip", TEST_JOBS=1
# make test-plain   run the tests on plain MLX operations, without any extension
# make metal-check  simulate the Metal kernels and cross-compile for macOS;
#   METAL_CHECK="--without-tests --pairs" where make test has run them, and for fewer dtypes
# make bench        step time, bandwidth, memory and growth beside the peers
# make convergence  train with each way to hold weights and states; hours without a fast BLAS
# make metal-cost   count bytes and launches on Metal, beside mlx.optimizers
# make sanitize     run the tests under the address, undefined and thread sanitizers
# make soak    100,000 steps beside mlx.optimizers; SOAK="--steps 1000 --seed 7"
# make wheel   build the source distribution, and from it the wheel for this machine
# make wheel-check  check that wheel with each MLX; WHEEL_CHECK="--mlx 0.31.2"
# make wheel-macos  cross-build the wheel for arm64 macOS
# make docs    the documentation, in build/docs
# make lint    ruff, mypy, clang-format and the schema of GitHub's workflows
# make clean   remove what the other targets made
#
# MLX=0.31.2   another MLX than the newest of cmake/mlx_versions.json; MLX=newest: that
#   of the package index. Each has an environment and a simulator of its own.

PYTHON ?= python3
MLX ?=
TEST_JOBS ?= 2
VENV := .venv$(if $(MLX),-$(MLX))
SIMULATOR := build/simulator$(if $(MLX),-$(MLX))
export MLX_FUSED_SIMULATOR_LIBRARY := $(CURDIR)/$(SIMULATOR)/tests/metal_simulator/libmetal_simulator.so
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

sources := pyproject.toml CMakeLists.txt README.md $(wildcard cmake/*) \
  $(shell find csrc metal python -type f -not -path '*/__pycache__/*')
simulator_sources := $(shell find tests/metal_simulator -type f -not -path '*/__pycache__/*')
cpp_sources := $(shell find csrc tests -name '*.h' -or -name '*.cpp') $(wildcard metal/*.h metal/*.metal)

# Those that take minutes begin first, so that none is left alone at the end.
longest := $(patsubst %,tests/test_%.py,wheels against_mlx cross_compile)
test_files := $(longest) $(filter-out $(longest),$(sort $(wildcard tests/test_*.py)))

.PHONY: demo test test-plain simulator metal-check bench convergence metal-cost sanitize soak wheel wheel-check wheel-macos docs lint format clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/package $(STAMPS)/examples
	$(BIN)/python examples/train_digits.py

test: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/examples $(STAMPS)/lora $(STAMPS)/bench simulator
ifeq ($(TESTS),)
	# Each file in a process of its own, two at a time: MLX 0.32.4 counts a task too many
	# after an error of a stream, and waits for ever when that has been too often. 5: no test.
	@rm -f $(VENV)/failed; printf '%s\n' $(test_files) | xargs -P $(TEST_JOBS) -n 1 sh -c ' \
	  log=$$(mktemp); $(BIN)/python -m pytest $$0 > $$log 2>&1; status=$$?; cat $$log; \
	  [ $$status -eq 0 ] || [ $$status -eq 5 ] || grep -E "^(FAILED|ERROR) " $$log \
	    >> $(VENV)/failed || echo "$$0 ended with $$status" >> $(VENV)/failed; rm $$log'; \
	if [ -e $(VENV)/failed ]; then cat $(VENV)/failed; exit 1; fi
else
	$(BIN)/python -m pytest $(TESTS)
endif

# The package as it is for an MLX that no extension fits: nothing is compiled.
PLAIN := build/plain
test-plain: $(STAMPS)/test $(STAMPS)/examples $(STAMPS)/lora $(STAMPS)/bench
	rm -rf $(PLAIN) && mkdir -p $(PLAIN)
	cp -R python/mlx_fused_optimizers $(PLAIN)
	cp metal/update_rules.h metal/formats.h $(PLAIN)/mlx_fused_optimizers
	PYTHONPATH=$(CURDIR)/$(PLAIN) MLX_FUSED_TEST_BACKENDS=plain \
	  PYTHONWARNINGS="ignore:mlx_fused_optimizers uses plain MLX operations" \
	  $(BIN)/python -m pytest $(TESTS)

simulator: $(STAMPS)/simulator

metal-check: $(STAMPS)/package $(STAMPS)/test simulator
	$(BIN)/python tests/metal_check.py $(METAL_CHECK)

metal-cost: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/bench simulator
	$(BIN)/python -m bench.metal_cost

wheel: $(STAMPS)/build $(STAMPS)/test
	$(BIN)/python cmake/build_wheels.py --output dist

wheel-check: wheel
	$(BIN)/python tests/wheel_check.py $(WHEEL_CHECK)

wheel-macos: $(STAMPS)/build $(STAMPS)/test
	$(BIN)/python tests/cross_compile/cross_compile.py --wheels dist

bench: $(STAMPS)/package $(STAMPS)/bench $(STAMPS)/examples
	$(BIN)/python -m bench
	$(BIN)/python -m bench.train_step
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.distributed
	$(BIN)/python -m bench.front_page
	$(BIN)/python -m bench.accumulate
	$(BIN)/python -m bench.optimizers
	$(BIN)/python -m bench.fuse

convergence: $(STAMPS)/package $(STAMPS)/bench $(STAMPS)/examples
	$(BIN)/python -m bench.convergence

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
	rm -rf .venv .venv-* build dist

# The build's own requirements, read from where pip would, and CMake and Ninja
# where the machine has none. Installed once: an isolated build would fetch them
# and compile everything anew each time.
$(STAMPS)/build: pyproject.toml cmake/mlx_versions.json
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python cmake/build_requirements.py $(if $(MLX),--mlx $(MLX)) > $(VENV)/build.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/build.txt
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/package: $(STAMPS)/build $(sources)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

$(STAMPS)/simulator: $(STAMPS)/package $(STAMPS)/test $(simulator_sources)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SIMULATOR) -G Ninja \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DMLX_FUSED_SIMULATOR=ON > $(SIMULATOR).log
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SIMULATOR) >> $(SIMULATOR).log
	touch $@

# The extras of pyproject.toml, without building the package again.
$(STAMPS)/test $(STAMPS)/examples $(STAMPS)/lora $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/lint: $(STAMPS)/build
	$(BIN)/python cmake/build_requirements.py $(@F) > $(VENV)/$(@F).txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/$(@F).txt
	touch $@
