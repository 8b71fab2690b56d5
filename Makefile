# `make train`, `make test` and `make check` set up what they need in .venv: a bare machine needs only Python, make and git.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt
CORPUS := data/stdlib

# Stamps inside .venv: what was installed, no older than pyproject.toml and constraints.txt.
CREATED := $(VENV)/.created
TRAIN_READY := $(VENV)/.train-ready
DEV_READY := $(VENV)/.dev-ready
# Triton for the tests of its kernels, in a folder of its own: a CUDA build of torch demands another one in the
# environment. There are wheels for Linux on x86-64.
TRITON := 3.6.0
ifeq ($(shell uname -sm),Linux x86_64)
TRITON_READY := $(VENV)/triton-$(TRITON)/.ready
endif

define CHECK_PYTHON
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit("farspan needs Python 3.11 to 3.14, and %s is %d.%d: run make PYTHON=/path/to/python3.12 with one that fits."
        % ((sys.executable,) + sys.version_info[:2]))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s lacks venv or ensurepip: install them (on Debian and Ubuntu, the package python%d.%d-venv)."
        % ((sys.executable,) + sys.version_info[:2]))
endef
export CHECK_PYTHON

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-all faults check docs device-costs gpu

help:
	@echo "make train   train a small model on this machine, two processes, on Python's own sources"
	@echo "make test    run all tests"
	@echo "make test-all   run all tests, and compile the Triton kernels even where they have not changed"
	@echo "make faults  run the tests that kill and stop runs for minutes, on a SLURM cluster of virtual nodes too"
	@echo "make check   format, lint, types and the layout's rules"
	@echo "make docs    write what is generated in the documentation: docs/configuration.md, the README's table"
	@echo "make device-costs   write docs/device_costs.md: what layers ask of the host and a GPU, counted without one"
	@echo "make gpu     on a machine with a GPU: check attention and experts, then measure them; $(PYTHON) needs torch, triton, numpy"

train: $(TRAIN_READY) $(CORPUS)/train/meta.json
	$(RUN) -m farspan.launch.cli launch local configs/demo.toml --gpus-per-node 2

# One process more than there are cores, as many tests wait; each file is run by one of them, in the order of the files.
test: $(DEV_READY) $(TRITON_READY)
	$(RUN) -m pytest tests -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --no-loadscope-reorder

test-all:
	COMPILE_KERNELS=1 $(MAKE) test

faults: $(DEV_READY)
	$(RUN) -m pytest -m faults tests

check: $(DEV_READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(RUN) -m pytest --quiet tests/test_layout.py

docs: $(DEV_READY)
	$(RUN) -m farspan.tools.generated_docs

device-costs: $(DEV_READY) $(TRITON_READY)
	$(RUN) -m tests.support.pretend_cuda.table docs/device_costs.md

# Nothing is installed: a GPU's machine has the torch that fits its driver. Wrong checks do not keep it from measuring.
gpu:
	@PYTHONPATH=. $(PYTHON) -m farspan.tools.gpu_checks --far-tokens 3145728 --budget-s 200; checked=$$?; \
	if [ $$checked -eq 2 ]; then exit 2; fi; \
	PYTHONPATH=. $(PYTHON) -m farspan.tools.bench_attention --device cuda --memory 16K,32K,64K --budget-s 260 \
	&& PYTHONPATH=. $(PYTHON) -m farspan.tools.bench_experts --device cuda --budget-s 30 \
	&& exit $$checked

$(CORPUS)/train/meta.json: | $(TRAIN_READY)
	$(RUN) -m farspan.launch.cli data prepare "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
		--tokenizer bytes --suffix .py --exclude site-packages --exclude dist-packages --exclude __pycache__ \
		--skip-unreadable --validation-fraction 0.05 --out $(CORPUS)

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 to 3.14." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# setuptools comes first and the build is not isolated, so that the build backend is the pinned one under any pip.
$(TRAIN_READY): pyproject.toml constraints.txt | $(CREATED)
	@echo "Installing farspan into $(VENV); torch is a large download the first time."
	@$(INSTALL) --quiet setuptools
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(DEV_READY): $(TRAIN_READY)
	@echo "Installing the test and check tools into $(VENV)."
	@$(INSTALL) --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/triton-$(TRITON)/.ready: | $(DEV_READY)
	@echo "Installing Triton $(TRITON) into $(@D), for the tests of its kernels."
	@rm -rf $(@D)
	@$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --target $(@D) triton==$(TRITON)
	@touch $@
