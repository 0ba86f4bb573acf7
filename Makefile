# The two commands: make run, make test. Each makes .venv itself, pinned and checked by hashes.
PYTHON3 ?= python3
CONFIG  ?= ops/bot.example.toml
VENV    := .venv
PYTHON  := $(VENV)/bin/python
PIP     := $(PYTHON) -m pip --disable-pip-version-check
PYTEST  := $(PYTHON) -m pytest
LIST    := CUSTOM_COMPILE_COMMAND="make lock" $(PYTHON) -m piptools compile -q --strip-extras \
           --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host
COMPILE := $(LIST) --build-deps-for editable

CLIENTS := binance-sdk-derivatives-trading-usds-futures==18.0.1 binance-futures-connector==4.2.0 \
           python-binance==1.0.37 typed-binance==1.6.0

ANSIBLE := ansible-core==2.19.14 ansible-lint==26.10.1

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help run test check drill bench docs lock install clients test-host

help:
	@echo "make run     trade on the paper exchange, in the foreground; Ctrl-C ends it (CONFIG=path)"
	@echo "make test    the tests, at most 10 minutes; four side by side, they mostly wait"
	@echo "make check   lint, types, layers, generated docs, example config"
	@echo "make drill   the long proofs; make bench: the measurements"
	@echo "make test-host INVENTORY=FILE   push to a throwaway Debian 12 host over SSH, and try it: an hour;"
	@echo "               SHORT=1: a quarter of it; two hosts in the inventory: a restore on the second, too"
	@echo "make docs    write the generated docs; make lock: refresh the pinned requirements"

run: $(VENV)/.run
	@$(PYTHON) -m bot.run --config $(CONFIG)

install: $(VENV)/.run

test: $(VENV)/.dev
	@$(PYTEST) -m "not drill and not bench and not host" -n 4 --dist loadfile --no-loadscope-reorder --durations=10 \
	  -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true $(ARGS)

check: $(VENV)/.dev
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@$(PYTHON) docs/generate.py --check
	@$(PYTEST) -q tests/unit/test_tidy.py tests/unit/test_docs.py tests/unit/test_config_file.py

# What each alert's drill took is kept in docs/drills.md.
drill: $(VENV)/.dev
	@TRADEHOST_KEEP_DRILLS=1 $(PYTEST) -m drill --durations=10 $(ARGS)

bench: $(VENV)/.dev
	@$(PYTEST) -s -m bench $(ARGS)

docs: $(VENV)/.dev
	@$(PYTHON) docs/generate.py

lock: $(VENV)/.dev
	$(COMPILE) --output-file ops/requirements.lock setup.cfg pyproject.toml
	$(COMPILE) --extra dev --constraint ops/requirements.lock \
	  --output-file ops/requirements-dev.lock setup.cfg pyproject.toml
	printf '%s\n' $(CLIENTS) | $(LIST) --output-file ops/requirements-clients.lock -
	printf '%s\n' $(ANSIBLE) | $(LIST) --output-file ops/requirements-ansible.lock -

$(VENV)/bin/pip:
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@echo "making $(VENV) ..."
	@$(PYTHON3) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "The virtual environment cannot be made; on Debian: apt-get install python3-venv"; exit 1; }

# The project itself is linked, not copied, and built with the pinned setuptools: nothing comes in unpinned.
$(VENV)/.run: ops/requirements.lock setup.cfg pyproject.toml | $(VENV)/bin/pip
	@echo "installing what it runs on (once; a minute or two) ..."
	@$(PIP) install --require-hashes -r ops/requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: ops/requirements-dev.lock $(VENV)/.run
	@echo "installing what tests and checks need (once) ..."
	@$(PIP) install --require-hashes -r ops/requirements-dev.lock
	@touch $@

# Public clients of the exchange that tests try on the paper one; apart, they want other libraries than we.
clients: build/clients/.made

build/clients/.made: ops/requirements-clients.lock | $(VENV)/bin/pip
	@$(PYTHON3) -m venv build/clients
	@build/clients/bin/python -m pip --disable-pip-version-check install -q --require-hashes -r $<
	@touch $@

# What pushes to a host, apart for the same reason. In this order: each goes on with the host that the one before left.
test-host: $(VENV)/.dev build/ansible
	@test -n "$(INVENTORY)" || { echo "make test-host INVENTORY=FILE: an Ansible inventory of throwaway hosts"; exit 2; }
	@TRADEHOST_INVENTORY=$(abspath $(INVENTORY)) $(if $(SHORT),TRADEHOST_SWITCHES=3) \
	  $(PYTEST) -s -v -x -m "host$(if $(SHORT), and not long)" --durations=12 \
	  $(addprefix tests/ops/test_,$(addsuffix .py,host host_monitoring upgrades host_restore)) $(ARGS)

build/ansible: ops/requirements-ansible.lock | $(VENV)/bin/pip
	@$(PYTHON3) -m venv $@
	@$@/bin/python -m pip --disable-pip-version-check install -q --require-hashes -r $<
	@touch $@
