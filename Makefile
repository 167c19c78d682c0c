# Two commands, from a bare clone on a machine with python3: `make demo` trains on real digits, `make test` tests.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test
demo: $(VENV)/.installed
	$(VENV)/bin/fastlocal train --data digits

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

# Editable, because an installed copy would hide behind ./fastlocal when used from inside the checkout.
# Debian ships python3 without the part of venv that brings pip; only root can add it.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy python3-venv; } \
		|| { echo 'error: python3-venv is missing; install it with: sudo apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -e '.[test]'
	touch $@
