VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
MINUTES_SCALE ?= 1
SOURCES := pyproject.toml $(wildcard kernels/*)

.PHONY: install demo test lint bench model clean

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --editable .
	touch $@

$(VENV)/.developer: $(VENV)/.installed
	$(BIN)/python -m pip install -q --editable ".[test,lint]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/edge-rsvlm demo

test: $(VENV)/.developer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile $(PYTEST_FLAGS)

bench: $(VENV)/.developer
	$(BIN)/python -m pytest benchmarks -s

# The packaged model anew, from ../shared/data. Its stages train for set times, 163 minutes together, and take more steps
# on a faster machine: `make model MINUTES_SCALE=0.2` trains for 33 minutes.
model: $(VENV)/.installed
	$(BIN)/python -m pip install -q --editable ".[export,search]"
	$(BIN)/python -m edge_rsvlm.export.default.train --adopt --minutes-scale $(MINUTES_SCALE)
	$(BIN)/python -m edge_rsvlm.export.default.thresholds
	$(BIN)/python -m edge_rsvlm.export.default.make_bundle

# mypy reads the package as it is installed: export/ and device_profiles/ sit under edge_rsvlm.
lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/edge_rsvlm
	ln -s $(CURDIR)/edge_rsvlm/* $(CURDIR)/export $(CURDIR)/device_profiles build/typecheck/edge_rsvlm/
	MYPYPATH=build/typecheck $(BIN)/mypy -p edge_rsvlm

clean:
	rm -rf build $(VENV)
