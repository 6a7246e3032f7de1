# Each target creates what it needs: a virtual environment and the packages in it.
PYTHON ?= python3
# Needs transformers < 5, the last line with Flax models; the CLI runs the rest of the package.
FLAX_TESTS := tests/models/test_flax.py tests/checkpoints tests/test_cli.py
# The tests of a file share what they set up, and what they compile.
PYTEST := -m pytest -q -n auto --dist loadfile

.PHONY: demo bench test lint format docs clean

demo: .venv/.installed
	.venv/bin/sparseffn demo

# PyTorch's products are among what is measured.
bench: .venv/.installed-dev
	.venv/bin/sparseffn bench all

test: .venv/.installed-dev .venv-flax/.installed
	.venv/bin/python $(PYTEST)
	.venv-flax/bin/python $(PYTEST) $(FLAX_TESTS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/.installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Executes the tutorials; a warning or a cell that raises fails it.
docs: .venv/.installed-docs
	.venv/bin/sphinx-build -W --keep-going -E -b html docs build/docs

clean:
	rm -rf .venv .venv-flax runs build/docs .pytest_cache .ruff_cache .hypothesis *.egg-info

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/pip install --quiet --editable '.[test,torch,eval,lint,programs]'
	touch $@

.venv/.installed-docs: .venv/.installed
	.venv/bin/pip install --quiet --editable '.[docs]'
	touch $@

.venv-flax/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-flax
	.venv-flax/bin/pip install --quiet --editable '.[test]' 'transformers<5'
	touch $@
