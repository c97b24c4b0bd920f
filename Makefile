# make train takes a fresh machine with Python and make to a trained net; make test to passing tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train tune token ui test cluster quick long fuzz check bench clean help

help:  ## print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/ready  ## create .venv with the locked packages and the project (SETUP=pip: without uv)

.venv/ready: requirements.lock pyproject.toml install.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python install.py $(SETUP)
	@touch .venv/ready

train: setup  ## train on the bundled digits: two workers, about a minute
	$(BIN)/python jobs/train.py

tune: setup  ## tune on the bundled digits: 16 trials, about two minutes
	$(BIN)/python jobs/tune.py

token: .ray-token  ## create the token for your clusters, which only you can read

.ray-token:
	@umask 077 && $(PYTHON) -c 'import secrets; print(secrets.token_hex(32))' > .ray-token

ui: setup  ## open tunnels to a cluster's dashboard and MLflow: make ui CLUSTER=cluster.yaml
	@$(BIN)/python jobs/ui.py $(or $(CLUSTER),cluster.yaml)

test: setup  ## run all tests except make long and make cluster, under 15 minutes on two cores
	$(BIN)/python -m pytest

long: setup  ## run the tests that take minutes each, half an hour in all
	$(BIN)/python -m pytest -m "long and not cluster"

cluster: setup  ## test a cluster of hosts in network namespaces, as root; FAULTS=1 adds the fault tests, which take much longer
	$(BIN)/python -m pytest tests/cluster/test_cluster.py tests/cluster/test_growing.py -s $(if $(FAULTS),-m cluster,-m "cluster and not long")

quick: setup  ## run the fast tests, which do not start Ray, under two minutes
	$(BIN)/python -m pytest -m "not ray and not slow and not long and not cluster"

fuzz: setup  ## feed damaged files to all readers of foreign files: make fuzz MINUTES=60
	$(BIN)/python tests/fuzz/fuzz.py --minutes $(or $(MINUTES),60)

check: setup  ## check lint, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## run the benchmarks, which write benchmarks/results
	$(BIN)/python benchmarks/lrn.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/layouts.py

clean:  ## remove the environment, caches and results
	rm -rf .venv build runs mlflow.db mlartifacts *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
