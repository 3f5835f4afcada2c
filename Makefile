PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
RUN = $(VENV)/bin/python

.PHONY: quickstart install test test-slow test-core test-peers test-buckets test-gpu-compiler plans lint format clean

quickstart: $(VENV)/installed        ## fine-tune a published encoder on movie reviews, on a CPU
	$(RUN) -m research.main --config=configs/movie_snippets.py --workdir=runs/quickstart

test: $(VENV)/installed-test         ## the hermetic tests
	$(RUN) -m pytest -n 2 --dist worksteal -q

test-slow: $(VENV)/installed-test    ## the same checks on more cases
	$(RUN) -m pytest -n 2 --dist worksteal -q -m slow

CORE = $(addprefix tests/,build_test.py checkpoint_test.py experiment_test.py main_test.py optimizer_test.py \
	resume_test.py sharding_test.py step_test.py train_test.py data/dataset_test.py data/source_test.py models)
test-core: $(VENV)/installed-test    ## what another version of Python or JAX is most likely to break
	$(RUN) -m pytest -n 2 --dist worksteal -q $(CORE)

test-peers: $(VENV)/installed-test   ## comparisons with PyTorch and Transformers
	$(RUN) -m pytest -q -m peers

test-buckets: $(VENV)/installed-test ## runs in buckets, against servers on this machine (EXTRAS=test,buckets-test)
	$(RUN) -m pytest -q -m "slow or not slow" tests/storage_test.py tests/buckets_test.py

test-gpu-compiler: $(VENV)/installed-test ## training steps compiled for GPUs that are not here (EXTRAS=test,gpu-compiler)
	$(RUN) -m pytest -q tests/runtime/absent_gpus_test.py

plans: $(VENV)/installed-tpu         ## what the published configs need on the TPU slices that they name; takes hours
	$(RUN) experiments/plans/plan_all.py

lint: $(VENV)/installed-test         ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed-test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

install:                             ## into $(VENV), with EXTRAS
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".$(if $(EXTRAS),[$(EXTRAS)])"
	touch $(VENV)/installed $(if $(findstring test,$(EXTRAS)),$(VENV)/installed-test) \
		$(if $(findstring tpu,$(EXTRAS)),$(VENV)/installed-tpu)

$(VENV)/installed: pyproject.toml
	$(MAKE) install EXTRAS=
$(VENV)/installed-test: pyproject.toml
	$(MAKE) install EXTRAS=test
$(VENV)/installed-tpu: pyproject.toml
	$(MAKE) install EXTRAS=tpu

clean:
	rm -rf $(VENV) build *.egg-info
