# `make run` and `make test` do all the set-up on a machine that has Python 3.11 or newer, pip, venv and make.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where Dagster keeps runs and events, and where the platform keeps artifacts.
export DAGSTER_HOME ?= $(CURDIR)/.dagster
export HOUSING_ROOT ?= $(CURDIR)/data
UI_PORT ?= 3000
# Hosts of each job of `make rehearse`; its image: `own`, as the Dockerfile makes it, or `aws`: none is configured; the
# Python that stands for AWS's image, which has 3.12.
HOSTS ?= 2
IMAGE ?= own
IMAGE_PYTHON ?= $(BIN)/python
# Of pytest, each with a Ray session of its own. Many tests wait for processes that they have started: more than cores.
TEST_PROCESSES ?= 3
# Of the tests that `make check` runs: a folder of tests/unit.
ROOM ?=
# A file with run configuration: make run CONFIG=my_config.yaml
CONFIG ?=
# Without compiled bytecode everything that Ray does is several times slower.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Knows the addresses of AWS's images.
$(VENV)/.installed-sagemaker: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sagemaker]'
	@touch $@

.PHONY: install
install: $(VENV)/.installed  ## Create .venv and install the platform

.PHONY: run
run: $(VENV)/.installed  ## Materialize the whole graph on local Ray
	@$(BIN)/python -m housing_assets.local_places prepare
	@start=$$(date +%s); $(if $(HOUSING_LANDING),days=$$($(BIN)/python -m housing_assets.automation.days) &&) \
	  PYTHONWARNINGS=ignore $(BIN)/dagster asset materialize --select '*' -m housing_assets.definitions \
	  $(if $(HOUSING_LANDING),--partition-range "$$days") --config console.yaml $(if $(CONFIG),--config "$(CONFIG)"); \
	  status=$$?; $(BIN)/python -m housing_assets.reporting.summary $$start && exit $$status

.PHONY: ui
ui: $(VENV)/.installed  ## Open the Dagster UI on http://127.0.0.1:3000 (UI_PORT=...)
	@$(BIN)/python -m housing_assets.local_places prepare
	PYTHONWARNINGS=ignore $(BIN)/dagster dev --host 127.0.0.1 --port $(UI_PORT)

.PHONY: stop
stop: $(VENV)/.installed  ## Stop the local endpoints, of all environments
	@for root in "$$HOUSING_ROOT"/endpoints "$$HOUSING_ROOT"/environments/*/endpoints; do \
	  if [ -d "$$root" ]; then $(BIN)/python -m resources.endpoints.local stop --root "$$root"; fi; done

.PHONY: lint
lint: $(VENV)/.installed-dev  ## Run ruff, pyright and the rules on imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyright

.PHONY: format
format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# As root on Debian: iproute2 (the emulated SageMaker gives every host a network namespace of its own), PostgreSQL
# (Dagster's storage for a team) and Chromium (the UI). Without them, the tests that need them say so and are skipped.
WANTED = iproute2 postgresql chromium
rehearse: WANTED = iproute2
.PHONY: system-packages
system-packages:
	@missing=; \
	for package in $(WANTED); do case $$package in \
	  iproute2) command -v ip ;; \
	  postgresql) ls /usr/lib/postgresql/*/bin/initdb || command -v initdb ;; \
	  chromium) command -v chromium ;; \
	  esac >/dev/null 2>&1 || missing="$$missing $$package"; done; \
	if [ "$$(id -u)" = 0 ] && [ -n "$$missing" ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq; \
	  for package in $$missing; do \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package \
	      || echo "$$package could not be installed; tests that need it are skipped" >&2; \
	  done; \
	fi

.PHONY: test
test: system-packages lint  ## Run ruff, pyright and all tests
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: check
check: $(VENV)/.installed-dev  ## Run the quick tests of one room (ROOM=step_scripts/data)
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile -m 'not slow' tests/unit/$(ROOM)

.PHONY: rehearse
rehearse: system-packages $(VENV)/.installed-dev $(if $(filter aws,$(IMAGE)),$(VENV)/.installed-sagemaker)
rehearse:  ## Materialize the whole graph on the emulated SageMaker (HOSTS=2 IMAGE=own, or aws)
	@$(BIN)/python -m tests.rehearse --hosts $(HOSTS) --image $(IMAGE) --image-python $(IMAGE_PYTHON)

.PHONY: bench
bench: $(VENV)/.installed-dev  ## Run the benchmarks (see benchmarks/README.md)
	$(BIN)/python -m benchmarks

.PHONY: constraints
constraints: $(VENV)/.installed-dev  ## Write the versions of .venv, with all extras, to constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,mlflow,postgres,sagemaker]'
	@{ echo '# Versions that are tested together. Written by `make constraints`.'; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude housing-assets; } > constraints.txt

.PHONY: clean-data
clean-data: $(VENV)/.installed  ## Stop the endpoint; remove artifacts, generated data and Dagster's history
	@$(BIN)/python -m housing_assets.local_places clean
