# Everything a developer runs. Users need none of it: python3 sems_mitm.py
PYTHON ?= python3
IMAGE  ?= sems_mitm

.DEFAULT_GOAL := help
.PHONY: help run demo test lint image bench soak tables

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

run:  ## the exporter, with the environment's settings
	$(PYTHON) sems_mitm.py serve

demo:  ## a simulated meter and inverter, a local portal, and the exporter between them
	$(PYTHON) sems_mitm.py demo

test:  ## all tests, warnings are errors
	$(PYTHON) -W error -m unittest -b test_sems_mitm

lint:  ## ruff and mypy, where they are
	@if command -v ruff >/dev/null; then ruff check . && ruff format --check --diff *.py; else echo "ruff is not here: not checked"; fi
	@if command -v mypy >/dev/null; then mypy --python-version 3.9 --check-untyped-defs sems_mitm.py; else echo "mypy is not here: not checked"; fi

image:  ## the container image
	docker build -t $(IMAGE) .

bench:  ## throughput, latency, memory and start beside their goals
	$(PYTHON) .ci/bench

MINUTES ?= 20
soak:  ## trouble for MINUTES (20): devices that stall and die, a portal that comes and goes
	$(PYTHON) .ci/soak $(MINUTES)

tables:  ## write the README's tables from the code's
	$(PYTHON) test_sems_mitm.py tables
