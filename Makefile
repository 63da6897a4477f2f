# One command each: set up, check, test, run. CI runs the same ones (.ci/run).
# `make VENV=/path ...` uses another environment than .venv.

PYTHON ?= python3
VENV ?= .venv
DATA ?= .luthier
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FUZZ_VENV ?= .venv-fuzz
FUZZ_READY := $(FUZZ_VENV)/.ready
FUZZ_SECONDS ?= 300
DEPLOY_VENV ?= .venv-deploy
DEPLOY_READY := $(DEPLOY_VENV)/.ready

.PHONY: quickstart setup fmt check sim sim-long cluster-long fuzz test up proto compat compat-newest \
	bench bench-log build deploy-check alerts roll

quickstart: $(READY)                    ## install, start the stack, fine-tune a model, stop the stack
	$(BIN)/luthier up --data $(DATA) --port 0 --run '$(BIN)/python examples/pig_latin.py'

setup: $(READY)                         ## the environment with everything, made once

# torch by name first: a looser range pulls several GB of CUDA packages. Groups need pip 25.1.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[worker]' --group dev
	touch $(READY)

fmt: $(READY)                           ## rewrite the code as `check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)                         ## lint, format, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

sim: $(READY)                           ## 500 simulated histories with faults, and every planted bug
	$(BIN)/python tests/simulation/run.py --histories 500

sim-long: $(READY)                      ## 20,000, and how often each planted bug shows by chance
	$(BIN)/python tests/simulation/run.py --histories 20000 --long

cluster-long: $(READY)                  ## 50 trials on real processes, then planted bugs: half an hour
	$(BIN)/python tests/cluster/run.py --trials 50 --planted

fuzz: $(READY) $(FUZZ_READY)            ## generated requests for FUZZ_SECONDS, from the OpenAPI description
	$(BIN)/python tests/fuzz/run.py --schemathesis $(FUZZ_VENV)/bin/st --seconds $(FUZZ_SECONDS)

# Of its own: it needs a pytest and a hypothesis that need not be those of the tests.
$(FUZZ_READY): tests/fuzz/requirements.txt
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install --quiet -r tests/fuzz/requirements.txt
	touch $(FUZZ_READY)

test: $(READY)                          ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not deploy"

up: $(READY)                            ## the whole stack on this machine, tiny model
	$(BIN)/luthier up --data $(DATA)

proto: $(READY)                         ## generate the code of our .proto anew
	$(BIN)/python -m grpc_tools.protoc -I core --python_out=core --pyi_out=core \
		core/luthier_core/proto/wire.proto

compat: $(READY)                        ## every SDK release against a stack; writes docs/compatibility.md
	$(BIN)/python -m tests.compat.matrix

compat-newest: $(READY)                 ## what the newest SDK release on PyPI changes on the wire
	$(BIN)/python -m tests.compat.newest

bench: $(READY)                         ## milliseconds per step through the whole stack
	$(BIN)/python benchmarks/bench_gateway.py

bench-log: $(READY)                     ## the operation log: latency, rate, polls, memory, overload
	$(BIN)/python benchmarks/bench_log.py

build: $(READY)                         ## the wheel, into dist/
	$(BIN)/python -m build --wheel

# kubectl, and promtool of Debian's package prometheus, are to be on PATH.
deploy-check: $(READY) $(DEPLOY_READY)  ## the manifests, the image and the alert rules, without a cluster
	PATH="$(CURDIR)/$(DEPLOY_VENV)/bin:$$PATH" deploy/check.sh
	$(BIN)/python -m pytest -q tests/deploy -m "not deploy"
	$(BIN)/python -m pytest -q tests/deploy/test_pods.py

alerts: $(READY)                        ## a real Prometheus on a stack, and three alerts by faults
	$(BIN)/python -m pytest -q tests/deploy/test_alerts.py

roll: $(READY)                          ## restart every part under the load of the official SDK
	$(BIN)/python -m tests.deploy.roll

$(DEPLOY_READY): deploy/requirements.txt
	$(PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python -m pip install --quiet -r deploy/requirements.txt
	touch $(DEPLOY_READY)
