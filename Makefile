# Each target makes .venv when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test check bench kill-test clean

demo: $(VENV)/installed   ## HiViT pre-trains, fine-tunes and predicts on real digits: demo_output/index.html
	$(RUN) examples/demo_digits.py

test: $(VENV)/installed   ## The whole test suite
	$(RUN) -m pytest

check: $(VENV)/installed  ## Style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/installed  ## Speed and memory against the peers: benchmarks/results/*.json and the README's tables
	$(RUN) benchmarks/attention.py
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/inference.py
	$(RUN) benchmarks/conversion.py
	$(RUN) benchmarks/loader.py
	$(RUN) benchmarks/finetuning.py
	$(RUN) benchmarks/table.py

kill-test: $(VENV)/installed  ## 20 SIGKILLs in each of 8 pre-trainings, held against uninterrupted ones, bit for bit (an hour)
	$(RUN) tests/kill_test.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.11' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo_output
