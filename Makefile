# make demo | test | test-peers | test-browser | test-gpu | docker-test | bench | bench-gpu | clean
# Each sets itself up in .venv and touches nothing else on the machine. make demo SERVE=0 stops
# before it serves the page; ARGS goes to demo.sh: make demo ARGS=--fast.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-peers test-browser test-gpu docker-test bench bench-gpu clean

demo: .venv/runtime
	@bash demo.sh $(ARGS)

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not peers and not slow and not browser" tests

test-peers: .venv/peers .venv-clients/stamp
	$(BIN)/python -m pytest -q -m "peers or slow" tests

# needs Chromium and axe-core: tests/test_browser.py says how to get them
test-browser: .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check playwright
	AXE=$${AXE:-package/axe.min.js} $(BIN)/python -m pytest -q -m browser tests/test_browser.py

# builds llm:cpu with Docker, or as root with buildah; MODEL=runs/demo-dpo instead of a tiny model
docker-test:
	$(PYTHON) deploy/docker_test.py $(if $(MODEL),--model $(MODEL))

# bench: every table that needs no other program, on the models that `make demo` made; figures also
# in runs/bench/*.json. A line that fails says why, and the next one is run.
PY = $(BIN)/python
measure = -@mkdir -p runs/bench; echo; echo "$$ python bench.py $(2)"; \
	$(PY) bench.py $(2) --json runs/bench/$(1).json

bench: .venv/runtime
	$(call measure,train,train)
	$(call measure,decode,decode 135m --formats float16 int8 int4)
	$(call measure,throughput,throughput runs/demo-sft)
	$(call measure,overhead,overhead)
	$(call measure,prefix,prefix runs/demo --length 200)
	$(call measure,serve,serve runs/demo-dpo --requests 768 --concurrency 256 --seqs 64 --rounds 12)
	$(call measure,optimizers,optimizers)

# At most ten minutes: everything compiles side by side, then each program is timed alone. Sources
# of the peers by path: NANOGPT=../nanoGPT GPTFAST=../gpt-fast make bench-gpu; DRY=--dry: the plan.
bench-gpu: $(if $(findstring .venv,$(PY)),.venv/peers)
	$(call measure,gpu,gpu --nanogpt "$(NANOGPT)" --gptfast "$(GPTFAST)" $(DRY))

# The tests with CUDA as the device. PY=python3 takes another Python than the one in .venv.
test-gpu: $(if $(findstring .venv,$(PY)),.venv/dev)
	@$(PY) -c "import torch; torch.cuda.is_available() or exit('make test-gpu: no CUDA device here')"
	OMP_NUM_THREADS=2 $(PY) -m pytest -q -n 4 -m "not peers and not slow and not browser" tests \
		$(addprefix --ignore tests/test_,deploy.py demo.py readme.py serve.py)

clean:
	rm -rf .venv .venv-clients .pytest_cache .ruff_cache .mypy_cache  # not runs/: your models

# One stamp per requirement file: pip runs only when the file has changed since.
.venv/runtime: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/peers: requirements-peers.txt .venv/dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-peers.txt
	@touch $@

# The chat clients that the server is tried with: what they pin stays apart from all else.
.venv-clients/stamp: requirements-clients.txt
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q --disable-pip-version-check -r requirements-clients.txt
	@touch $@
