# Two commands: `make lab` opens the course, `make test` tests it. Each sets up what it needs in .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv)

.PHONY: lab test setup lock models data retrain lint

lab: setup
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_start_here.ipynb

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

setup: $(VENV)/ready

$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The course needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 lab")'
ifdef UV
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
endif
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# For maintainers: pin anew (needs uv), write course_utils/models from the lessons, rebuild data, retrain what is shipped.
lock:
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' | uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --generate-hashes --constraints - --custom-compile-command "make lock" -o requirements.lock

models: setup
	$(BIN)/python tests/export_models.py course_utils/models

data: setup
	cd data/build && for set in emoji emojitwo reviews sentences penguins tokenizer glosses; do ../../$(BIN)/python $$set.py || exit 1; done

retrain: setup
	$(BIN)/python data/build/judge.py
	$(BIN)/python data/build/sentiment.py
	$(BIN)/python -m course_utils retrain all
