# make demo    one server saves a prefix, another reuses it (a few minutes; downloads at first)
# make check   lint and every quick test (under three minutes on two cores)
# make test    everything, on a real tritonserver
# make serve   serve on 127.0.0.1 until Ctrl-C
# make lint    ruff and mypy; hadolint and shellcheck for the container's files
# make setup   the environment alone (.venv); the others do it by themselves
#
# Needs Python >= 3.11 on Linux x86-64: make PYTHON=python3.12 setup. PIP_ARGS go to pip install.

PYTHON ?= python3
VENV := .venv
# Many tests wait for a clock or for a server, so that three processes keep two cores busy.
WORKERS ?= 3
STAMP := $(VENV)/.setup-done

.PHONY: demo check test serve lint structure setup
.DEFAULT_GOAL := setup

demo: $(STAMP)
	PYTHONPATH=tests $(VENV)/bin/python tests/demo/demo.py $(DEMO_ARGS)

# A missing tritonserver fails here instead of skipping. Tests of store `redis` need a redis-server
# (sudo apt-get install redis-server) and are skipped without one; KVFETCHER_REQUIRE_REDIS=1 fails.
test: $(STAMP)
	KVFETCHER_REQUIRE_TRITON=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

check: lint
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow and not triton' $(PYTEST_ARGS)

serve: $(STAMP)
	$(VENV)/bin/kvfetcher serve $(SERVE_ARGS)

# Imports between the parts of the product, upward ones, cycles, lines of code.
structure: $(STAMP)
	$(VENV)/bin/python tests/architecture.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck .ci/run python_backends/deploy/install.sh findings/*.sh

setup: $(STAMP)

# torch is pinned here, not in pyproject.toml: users bring their own build; tests compare bits.
$(STAMP): pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)/bin/pip install --progress-bar on $(PIP_ARGS) torch==2.13.0 -e '.[all]' --group test --group lint
	$(VENV)/bin/kvfetcher prepare
	touch $@

# Debian and Ubuntu split ensurepip off into a package of its own.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "KVFetcher needs Python >= 3.11, $(PYTHON) is older or missing: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing $$package, which $(PYTHON) -m venv needs" >&2; \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$$package"; \
	  else \
	    echo "$(PYTHON) -m venv needs the package $$package: sudo apt-get install $$package" >&2; \
	    exit 1; \
	  fi; }
	$(PYTHON) -m venv $(VENV)
