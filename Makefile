# make train   train the default model on the images in this package
# make test    the quick tests; with CI=true also the slow ones and the wheel
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint clean

train: .venv/installed
	$(BIN)/python train_accelerate.py

test: .venv/installed
	$(BIN)/pytest $(if $(CI),,-m "not slow")

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo Installing, some minutes
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf .venv out
