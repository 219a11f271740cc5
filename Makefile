# make demo: a real model measured, converted, compared, generating. make test: the whole gate.
# make test-clients: real coding agents, installed into .clients, against a live server (its own job).
# Each makes its own environment in .venv.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Without a fast BLAS of the system, Linux on x86-64 gets one from the package index (docs/platforms.md).
FAST := $(shell [ "$$(uname -sm)" = "Linux x86_64" ] && ! ldconfig -p 2>/dev/null | grep -q libopenblas && echo ,fast)

# The lowest allowed versions of what we build on, as in pyproject.toml (tests/borders/test_versions.py).
LOWEST := mlx==0.32.0 mlx-lm==0.32.0

.PHONY: demo test test-clients test-lowest lint docs

demo: .venv/ready
	bash benchmarks/demo.sh

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not clients"

test-clients: .venv/ready
	$(BIN)/python tests/agents/install.py
	$(BIN)/python -m pytest -m clients tests/agents tests/tui/test_browser.py

test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile tests/unit tests/patches

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/ready
	$(BIN)/python -m mlx_optiq_ext.cli.reference

.venv-lowest/ready: VERSIONS := $(LOWEST)
.venv/ready .venv-lowest/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 to 3.14 with its venv module (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev$(FAST)]' $(VERSIONS)
	touch $@
