# The two main commands are `make demo` and `make test`. They need only Python 3.11 or later, its venv
# module and make. uv is used if it is installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The tests start many servers. Keep the compiled modules that all of them import.
unexport PYTHONDONTWRITEBYTECODE

# Four test files at a time, each process with its own servers: a test spends half of its time waiting.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist loadfile

.PHONY: demo run test suite test-all test-full test-pythons test-js flakes faults attacks audit lint bench bench-cancel bench-backlog docs lock clean

demo: $(READY)  ## Start a whole server, run the cancel guide with the real SDK, and stop it.
	$(BIN)/python -m belay_server.cli.demo

run: $(READY)  ## Run the server with the example project until Ctrl-C. PORT=… sets the port.
	$(BIN)/belay dev $(if $(PORT),--port $(PORT))

test: $(READY)  ## Run static checks and the quick suite, which covers every promise once.
	@$(MAKE) --no-print-directory --jobs 2 lint suite

suite: $(READY)  ## Run the quick suite without the static checks.
	$(PYTEST)

test-all: $(READY)  ## Run what `make test` leaves out: further cases and faults, hosts, JavaScript.
	$(PYTEST) --long
	TEST_ISOLATION=auto $(PYTEST)
	$(BIN)/python -m tests.js.run --if-there

test-full: $(READY)  ## Run the longest forms: thousands of seeded cases. Takes hours.
	$(PYTEST) --full

test-pythons:  ## Run the quick suite with each of Python 3.11, 3.12 and 3.13 that is installed.
	@for version in 3.11 3.12 3.13; do \
		if python$$version -c '' >/dev/null 2>&1; then \
			$(MAKE) test PYTHON=python$$version VENV=.venv-$$version || exit 1; \
		else echo "python$$version is not installed"; fi; \
	done

flakes: $(READY)  ## Run the quick suite TIMES (10) times, half of them on a busy machine.
	$(BIN)/python -m tests.flakes $(if $(TIMES),--times $(TIMES)) -- --numprocesses 4

faults: $(READY)  ## Inject random faults for SECONDS (1500) with SEED; writes fault-report.md.
	$(BIN)/python -m tests.faults.monkey $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

attacks: $(READY)  ## Run the attacks with new seeds for SECONDS (3600), starting at SEED.
	$(BIN)/python -m tests.attacks.hour $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

audit: $(READY)  ## Check the locked packages for advisories. AUDIT=--if-there allows an unavailable service.
	@if command -v uv >/dev/null 2>&1; then uv pip install --quiet --python $(BIN)/python pip-audit; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit; fi || true
	$(BIN)/python -m tests.audit $(AUDIT)

test-js: $(READY)  ## Test the JavaScript SDK against a live server. Needs Node 20.
	$(BIN)/python -m tests.js.run

lint: $(READY)
	$(BIN)/ruff check app workers tests
	$(BIN)/ruff format --check app workers tests
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## Measure speed against targets. BASELINE=http://… measures another server too.
	$(BIN)/python -m tests.bench.speed $(if $(BASELINE),--baseline $(BASELINE)) \
		$(if $(BASELINE_PID),--baseline-pid $(BASELINE_PID))

bench-cancel: $(READY)  ## Measure how fast each kind of node is stopped, at the node.
	$(BIN)/python -m tests.bench.cancel

bench-backlog: $(READY)  ## Measure 100,000 pending runs: claims, repeated doorbells, cancelling all.
	$(BIN)/python -m tests.bench.backlog

docs: $(READY)  ## The documentation, built strictly into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Belay needs Python 3.11 or later; \
	$(PYTHON) is %s. Name another one, for example: make demo PYTHON=python3.12" % sys.version.split()[0])'
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

lock:  ## Pin all packages again (needs uv).
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --extra test --no-annotate -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .belay site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
