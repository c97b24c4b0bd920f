# make train: from a fresh machine with Python and make to a trained net. make test: to passing tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train tune token ui test cluster quick long check bench clean help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/ready  ## make .venv with the locked packages and the project

.venv/ready: requirements.lock pyproject.toml install.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python install.py $(SETUP)
	@touch .venv/ready

train: setup  ## train the embedded recipe: two workers, about a minute
	$(BIN)/python jobs/train.py

tune: setup  ## search the embedded recipe's settings: 16 trials, about three minutes
	$(BIN)/python jobs/tune.py

token: .ray-token  ## make the token of your clusters, which only you may read

.ray-token:
	@umask 077 && $(PYTHON) -c 'import secrets; print(secrets.token_hex(32))' > .ray-token

ui: setup  ## tunnels to a cluster's dashboard and MLflow: make ui CLUSTER=cluster.yaml
	@$(BIN)/python jobs/ui.py $(or $(CLUSTER),cluster.yaml)

test: setup  ## the tests but those of make long, about a quarter of an hour on two cores
	$(BIN)/python -m pytest

long: setup  ## the tests of faults that take minutes each, half an hour in all
	$(BIN)/python -m pytest -m "long and not cluster"

cluster: setup  ## a cluster of several hosts in namespaces, as root; FAULTS=1 adds the faults, which take much longer
	$(BIN)/python -m pytest tests/cluster/test_cluster.py tests/cluster/test_growing.py -s $(if $(FAULTS),-m cluster,-m "cluster and not long")

quick: setup  ## the tests that start no Ray and need no patience
	$(BIN)/python -m pytest -m "not ray and not slow and not long and not cluster"

check: setup  ## lint, format, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## the benchmarks, into benchmarks/results
	$(BIN)/python benchmarks/lrn.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/layouts.py

clean:  ## remove the environment, caches and results
	rm -rf .venv build runs mlflow.db mlartifacts *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
