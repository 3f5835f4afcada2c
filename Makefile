PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
RUN = $(VENV)/bin/python

.PHONY: quickstart install test test-peers lint format clean

quickstart: $(VENV)/installed        ## fine-tune a published encoder on movie reviews, on a CPU
	$(RUN) -m research.main --config=configs/movie_snippets.py --workdir=runs/quickstart

test: $(VENV)/installed-test         ## the hermetic tests
	$(RUN) -m pytest -n 2 -q

test-peers: $(VENV)/installed-test   ## comparisons with PyTorch and Transformers
	$(RUN) -m pytest -q -m peers

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
	touch $(VENV)/installed $(if $(findstring test,$(EXTRAS)),$(VENV)/installed-test)

$(VENV)/installed: pyproject.toml
	$(MAKE) install EXTRAS=
$(VENV)/installed-test: pyproject.toml
	$(MAKE) install EXTRAS=test

clean:
	rm -rf $(VENV) build *.egg-info
