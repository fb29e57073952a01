# Two commands do everything: `make demo` and `make test`. Python 3.11+, its venv module and make are
# all they need. uv is used when it is there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The tests start many servers: what all of them import is compiled once.
unexport PYTHONDONTWRITEBYTECODE

# Three test files at a time, each process with servers of its own: half of the time a test waits.
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

.PHONY: demo run test test-all test-full test-js faults attacks audit lint bench bench-cancel bench-backlog docs lock clean

demo: $(READY)  ## Start everything, play the cancel guide with the real SDK, stop everything.
	$(BIN)/python -m belay_server.demo

run: $(READY)  ## The server with the example project, until Ctrl-C. PORT=… for another port.
	$(BIN)/belay dev $(if $(PORT),--port $(PORT))

test: lint  ## Static checks and the whole suite; the JavaScript SDK's too, where Node is there.
	$(PYTEST)
	$(BIN)/python -m tests.js.run --if-there

test-all test-full: lint  ## The same with the long forms: thousands of seeded cases.
	$(PYTEST) --long

faults: $(READY)  ## The monkey, for SECONDS (1500) with SEED; writes fault-report.md.
	$(BIN)/python -m tests.faults.monkey $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

attacks: $(READY)  ## The attacks with new seeds, for SECONDS (3600) from SEED.
	$(BIN)/python -m tests.attacks.hour $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

audit: $(READY)  ## What is locked, against the advisories known today. AUDIT=--if-there forgives no answer.
	@if command -v uv >/dev/null 2>&1; then uv pip install --quiet --python $(BIN)/python pip-audit; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit; fi || true
	$(BIN)/python -m tests.audit $(AUDIT)

test-js: $(READY)  ## The JavaScript SDK against a live server; needs Node 20.
	$(BIN)/python -m tests.js.run

lint: $(READY)
	$(BIN)/ruff check app workers tests
	$(BIN)/ruff format --check app workers tests
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## How fast everything is, against targets; BASELINE=http://… drives another server too.
	$(BIN)/python -m tests.bench.speed $(if $(BASELINE),--baseline $(BASELINE)) \
		$(if $(BASELINE_PID),--baseline-pid $(BASELINE_PID))

bench-cancel: $(READY)  ## How fast each kind of node is stopped, measured at the node.
	$(BIN)/python -m tests.bench.cancel

bench-backlog: $(READY)  ## 100,000 pending runs: claims, ringing again, cancelling them all.
	$(BIN)/python -m tests.bench.backlog

docs: $(READY)  ## The documentation, built strictly into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(READY): requirements.lock pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV); \
		uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes \
			-r requirements.lock; \
		uv pip install --quiet --python $(BIN)/python --no-deps -e .; \
	else \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .; \
	fi
	@touch $@

lock:  ## Pin everything again (needs uv).
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --extra test --no-annotate -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .belay site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
