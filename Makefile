# Four targets, no logic. The environment lives in .venv and is made again when what it holds changes.
PYTHON ?= python3
PROFILE ?= 16gb
MODEL ?= tests/data/tiny-gpt-oss

.PHONY: demo test check fix docs

demo: .venv/ready
	.venv/bin/exporter quantize --profile $(PROFILE) $(MODEL)

test: .venv/ready
	.venv/bin/python -m pytest

check: .venv/ready
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy

fix: .venv/ready
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

docs: .venv/ready
	.venv/bin/python scripts/make_docs.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable '.[all]'
	touch .venv/ready
