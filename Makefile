# `make demo` and `make test` set everything up themselves on a bare clone (Python 3.11 or newer, pip).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LMMS := $(VENV)-lmms
OLDEST := $(VENV)-oldest
QUANTISED := $(VENV)-quantised
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist worksteal
# what also runs on the oldest supported transformers
MODEL_TESTS := $(patsubst %,tests/test_%.py,laws reference scoring budget versions graphs)
# one thread each: two test workers on two cores beat two threads that fight
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test nightly test-oldest test-quantised test-lmms train-tiny lint format bench bench-gpu notebooks wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first and by its exact version: the other packages then find it and fetch no other build
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,viz,eval]'
	touch $(STAMP)

demo: setup
	$(BIN)/holimerge demo

test: setup lint $(LMMS)/.installed $(OLDEST)/.installed $(QUANTISED)/.installed
	$(BIN)/pytest $(SPREAD) tests
	$(MAKE) test-oldest test-quantised

# hostile inputs: many cases, drawn anew each time, on every family; a failing case is printed
nightly: setup
	HOLIMERGE_CASES=10000 HOLIMERGE_ALL_FAMILIES=1 $(BIN)/pytest $(SPREAD) tests/test_hostile.py

# the model tests on the oldest supported transformers, in an environment of its own on top of the main one's packages;
# a few families only, unless HOLIMERGE_ALL_FAMILIES is set
test-oldest: $(OLDEST)/.installed
	HOLIMERGE_SOME_FAMILIES=1 $(OLDEST)/bin/python -P -m pytest $(SPREAD) $(MODEL_TESTS)

# decoders quantised by torchao and bitsandbytes
test-quantised: $(QUANTISED)/.installed
	$(QUANTISED)/bin/python -P -m pytest $(SPREAD) tests/test_around.py -k weights

$(QUANTISED)/.installed: $(STAMP) constraints-quantised.txt
	$(call on_top,$(QUANTISED),constraints-quantised.txt)

# $(1): an environment that sees the main one's packages, and on top of them exactly what $(2) lists
define on_top
	rm -rf $(1)
	$(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	$(BIN)/pip --python $(1)/bin/python install --quiet --no-deps -r $(2)
	touch $(1)/.installed
endef

$(OLDEST)/.installed: $(STAMP) constraints-oldest.txt
	$(call on_top,$(OLDEST),constraints-oldest.txt)

# lmms-eval's own command line on our models, in an environment of its own: the main one's packages, and on top of them
# lmms-eval with the few that its command line needs (some ten seconds; its full list would bring another torch)
test-lmms: $(LMMS)/.installed
	$(BIN)/pytest tests/test_lmms_plugin.py

$(LMMS)/.installed: $(STAMP) constraints-lmms.txt
	$(call on_top,$(LMMS),constraints-lmms.txt)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the embedded model, from nothing: an hour or two on two cores; a killed run goes on where it was
train-tiny: setup
	$(BIN)/python -m holimerge.eval.tiny.train --work build/tiny

# every bench into results/; fails where a ratio fell by more than a tenth of what stood there
bench: setup
	$(BIN)/python -m holimerge.eval.bench_suite --output results

bench-gpu: setup
	$(BIN)/python -m holimerge.eval.bench_suite --output results --gpu

# run the notebooks and save them with their outputs
notebooks: setup
	$(BIN)/python -m holimerge.eval.notebooks

wheel: setup
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) $(OLDEST) $(LMMS) $(QUANTISED) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
