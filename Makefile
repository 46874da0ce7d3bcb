# make demo | test | test-peers | test-browser | docker-test | bench | clean — each sets itself up in .venv and touches nothing
# else on the machine. make demo SERVE=0 stops before it serves the page; ARGS goes to demo.sh: make demo ARGS=--fast.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-peers test-browser docker-test bench clean

demo: .venv/runtime
	@bash demo.sh $(ARGS)

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not peers and not slow and not browser" tests

test-peers: .venv/peers
	$(BIN)/python -m pytest -q -m "peers or slow" tests

test-browser: .venv/dev  # needs Chromium (apt-get install chromium, or $$CHROMIUM) and axe-core: tests/test_browser.py says how
	$(BIN)/python -m pip install -q --disable-pip-version-check playwright
	AXE=$${AXE:-package/axe.min.js} $(BIN)/python -m pytest -q -m browser tests/test_browser.py

docker-test:  # builds llm:cpu with Docker, or as root with buildah; MODEL=runs/demo-dpo instead of a tiny model
	$(PYTHON) deploy/docker_test.py $(if $(MODEL),--model $(MODEL))

bench: .venv/runtime
	$(BIN)/python bench.py train

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache  # not runs/: those are your models

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
