VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: install test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(wildcard kernels/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --editable ".[test,lint]"
	touch $@

test: install
	$(BIN)/python -m pytest

# mypy reads the package as it is installed: export/ and device_profiles/ sit under edge_rsvlm.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/edge_rsvlm
	ln -s $(CURDIR)/edge_rsvlm/* $(CURDIR)/export $(CURDIR)/device_profiles build/typecheck/edge_rsvlm/
	MYPYPATH=build/typecheck $(BIN)/mypy -p edge_rsvlm

clean:
	rm -rf build $(VENV)
