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

MALFORMED ?= 6000
COOKBOOK ?= 0.6.1
COOKBOOK_VENV ?= .venv-cookbook
COOKBOOK_READY := $(COOKBOOK_VENV)/.ready-$(COOKBOOK)
VLLM_VENV ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
TEST_PROCESSES ?= 2

.PHONY: quickstart setup fmt check up proto reference build
.PHONY: test test-s3 test-vllm malicious malformed sim sim-long cluster-long chaos chaos-long fuzz
.PHONY: compat compat-newest cookbook bench bench-log bench-listing deploy-check alerts roll

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

chaos: $(READY)                         ## the whole service, killed at every crash point: < 10 minutes
	$(BIN)/python tests/chaos/run.py

chaos-long: $(READY)                    ## 900 faulted runs with a toy engine, 100 with torch, planted bugs
	$(BIN)/python tests/chaos/run.py --long
	$(BIN)/python tests/chaos/run.py --planted

fuzz: $(READY) $(FUZZ_READY)            ## generated requests for FUZZ_SECONDS, from the OpenAPI description
	$(BIN)/python tests/fuzz/run.py --schemathesis $(FUZZ_VENV)/bin/st --seconds $(FUZZ_SECONDS)

# Of its own: it needs a pytest and a hypothesis that need not be those of the tests.
$(FUZZ_READY): tests/fuzz/requirements.txt
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install --quiet -r tests/fuzz/requirements.txt
	touch $(FUZZ_READY)

malformed: $(READY)                     ## MALFORMED malformed requests, a good client beside them
	$(BIN)/python -m tests.fuzz.malformed_run --cases $(MALFORMED)

test: $(READY)                          ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not deploy" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# A Ceph RGW of its own: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd
test-s3: $(READY)                       ## stores and the life of checkpoints: on disk, moto, Ceph RGW
	$(BIN)/python -m pytest --stores disk,moto,rgw --races 1000 \
		tests/contract/test_blobs.py tests/unit/test_checkpoints.py tests/unit/test_registry*.py

malicious: $(READY)                     ## malicious inputs by class, and the suite without each guard
	$(BIN)/python -m pytest -s --bombs 210 --cancellations 100000 --slow-connections 5000 \
		tests/malicious tests/contract/test_tenant_matrix.py tests/contract/test_connect.py \
		tests/contract/test_secrets.py tests/contract/test_http_slow.py \
		tests/contract/test_http_smuggling.py tests/contract/test_http_downloads.py \
		tests/contract/test_http_uploads.py tests/unit/test_registry_identity.py

test-vllm: $(READY) $(VLLM_READY)       ## the vllm engine on a real vLLM, compared with the torch engine
	LUTHIER_TEST_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest tests/vllm

# Of its own: vLLM needs other versions of libraries than we do. 3.5 GB. The packages that go again
# are built for another torch than the one for CPUs, and vLLM needs them for images and sound only.
$(VLLM_READY): tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet -r tests/vllm/requirements.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_READY)

up: $(READY)                            ## the whole stack on this machine, tiny model
	$(BIN)/luthier up --data $(DATA)

proto: $(READY)                         ## generate the code of our .proto anew
	$(BIN)/python -m grpc_tools.protoc -I core --python_out=core --pyi_out=core \
		core/luthier_core/proto/wire.proto

reference: $(READY)                     ## docs/sdk-reference.md from the docstrings of the client
	$(BIN)/python docs/sdk_reference.py

compat: $(READY)                        ## every SDK release against a stack; writes docs/compatibility.md
	$(BIN)/python -m tests.compat.matrix

compat-newest: $(READY)                 ## what the newest SDK release on PyPI changes on the wire
	$(BIN)/python -m tests.compat.newest

cookbook: $(READY) $(COOKBOOK_READY)    ## the training loops of tinker_cookbook, as they are, on a stack
	$(BIN)/python -m tests.cookbook.run --python $(COOKBOOK_VENV)/bin/python

# Of its own: the cookbook must meet the official SDK, and nothing of ours.
$(COOKBOOK_READY): tests/cookbook/requirements.txt
	$(PYTHON) -m venv $(COOKBOOK_VENV)
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet -r tests/cookbook/requirements.txt
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet --no-deps tinker_cookbook==$(COOKBOOK)
	touch $(COOKBOOK_READY)

bench: $(READY)                         ## milliseconds per step through the whole stack
	$(BIN)/python benchmarks/bench_gateway.py

bench-log: $(READY)                     ## the operation log: latency, rate, polls, memory, overload
	$(BIN)/python benchmarks/bench_log.py

bench-listing: $(READY)                 ## pages of 100,000 checkpoints and 10,000 runs
	$(BIN)/python benchmarks/bench_listing.py

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
