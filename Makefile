# Two commands, from a bare clone on a machine with python3: `make demo` trains on real digits, `make test` tests.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test soak test-oldest families docs
demo: $(VENV)/.installed
	$(VENV)/bin/fastlocal train --data digits

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

# Hours of kills, mutated files, full disks and steps; goes on where it stopped, prints one table. SHARE=0.01 does a hundredth.
SHARE ?= 1
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m soak --share $(SHARE)

# The oldest of everything that pyproject.toml allows, really installed, setuptools included; uv resolves. Gigabytes.
# With pyenv: make test-oldest OLDEST_PYTHON=~/.pyenv/versions/3.10.13/bin/python
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.10
test-oldest:
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q uv
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install -q setuptools==64.0.0 wheel
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install -q --no-build-isolation --resolution lowest-direct -e '.[test]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto

# Editable, because an installed copy would hide behind ./fastlocal when used from inside the checkout.
# Debian ships python3 without the part of venv that brings pip; only root can add it.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy python3-venv; } \
		|| { echo 'error: python3-venv is missing; install it with: sudo apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -e '.[test]'
	touch $@

# Which of timm's models fastlocal sees, each built without memory: tests/engine/families.csv, docs/families.md.
families: $(VENV)/.installed
	$(VENV)/bin/python tests/engine/families.py

# The site, in site/: pages of docs/ and the public docstrings. A broken link is an error.
docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict
