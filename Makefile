# Six targets, no logic. The environment lives in .venv and is made again when what it holds changes.
PYTHON ?= python3
PROFILE ?= 16gb
MODEL ?= tests/data/tiny-gpt-oss

.PHONY: demo matrix test check fix docs

demo: .venv/ready
	.venv/bin/exporter quantize --profile $(PROFILE) $(MODEL)

# Every artifact of every profile. How fast a model of 6 MB is says nothing: the long tests of speed are left out.
matrix: .venv/ready
	EXPORTER_SPEED_SECONDS=0 .venv/bin/exporter matrix --run --model $(MODEL)

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
