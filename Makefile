# `make demo` and `make test` set everything up themselves on a bare clone (Python 3.11 or newer, pip).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LMMS := $(VENV)-lmms
# one thread each: two test workers on two cores beat two threads that fight
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-oldest test-lmms train-tiny lint format bench notebooks wheel clean

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

test: setup lint $(LMMS)/.installed
	$(BIN)/pytest -n 2 --dist worksteal tests

# the model tests on the oldest supported transformers, in an environment of their own
OLDEST := $(VENV)-oldest
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n 2 tests/test_laws.py tests/test_reference.py tests/test_scoring.py tests/test_budget.py

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet torch -c constraints.txt
	grep -v -e '^transformers' -e '^huggingface_hub' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet -c $(OLDEST)/constraints.txt 'transformers==5.16.0' -e '.[test]'
	touch $(OLDEST)/.installed

# lmms-eval's own command line on our models, in an environment of its own: the main one's packages, and on top of them
# lmms-eval with the few that its command line needs (some ten seconds; its full list would bring another torch)
test-lmms: $(LMMS)/.installed
	$(BIN)/pytest tests/test_lmms_plugin.py

$(LMMS)/.installed: $(STAMP) constraints-lmms.txt
	rm -rf $(LMMS)
	$(BIN)/python -m venv --without-pip $(LMMS)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main-environment.pth"
	$(BIN)/pip --python $(LMMS)/bin/python install --quiet --no-deps -r constraints-lmms.txt
	touch $(LMMS)/.installed

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

bench: setup
	$(BIN)/python -m holimerge.eval.bench_reduction --output results
	$(BIN)/python -m holimerge.eval.bench_reading --output results

# run the notebooks and save them with their outputs
notebooks: setup
	$(BIN)/python -m holimerge.eval.notebooks

wheel: setup
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) $(OLDEST) $(LMMS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
