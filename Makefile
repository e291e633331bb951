# Every target makes its own virtual environment (.venv) and installs what it needs: exactly the versions, by their
# hashes, of requirements/*.lock, then torch by the exact version of constraints.txt, in the build that pip finds here
# (what else torch needs is locked, so pip adds only torch and the CUDA packages that its own metadata pins).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCKED := install --only-binary=:all: --require-hashes --no-deps --requirement
TORCH := install --only-binary=:all: --requirement constraints.txt
OURSELVES := install --no-deps --no-build-isolation --editable .
UV := uv==0.13.9
SBOM ?= dist/tsqp.cdx.json

# Tests are mostly single processes that wait for others: one process of pytest for each of two cores. A process takes
# the tests of modules in the random order, and when it has none left, the last ones of the other.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

# Whose branches `make coverage` counts, and by which tests. A tracer sees no compiled loop, so the tests of the loops run
# a second time uncompiled; there numpy warns of the overflow that the loops' arithmetic is meant to have.
COVERED := src/tsqp/trusted/guard src/tsqp/wire
UNCOMPILED := tests/trusted/guard/test_kernels.py tests/trusted/guard/test_core.py tests/vectors/test_guard.py
COVERAGE := $(BIN)/pytest --cov=tsqp.trusted.guard --cov=tsqp.wire --cov-branch --cov-append --cov-report=

# Clients that others made, in environments of their own: Python's and npm's.
CLIENTS := .venv-conformance/bin/python
NPM := npm --prefix conformance/node --ignore-scripts --no-audit --no-fund --omit-lockfile-registry-resolved

.PHONY: run test test-slow test-all check coverage mutants latest lock conformance conformance-lock bench gpu-check gpu-bundle wheel sbom sbom-lock image clean

run: .venv/.runtime  ## ask the default model a question; the worker sees noise (masked, the default)
	echo "What is the capital of France?" | $(BIN)/tsqp generate - --max-tokens 64 --stats

test: .venv/.dev  ## the test suite, in random order, without what takes long
	$(PYTEST) -m "not slow"

test-slow: .venv/.dev  ## what `make test` leaves out
	$(PYTEST) -m slow

test-all: .venv/.dev  ## both
	$(PYTEST)

check: .venv/.dev  ## the one gate: lint, format, types, import contracts, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

mutants: .venv/.dev  ## change one small thing of the guard after another; docs/audit.md explains what no test notices
	$(BIN)/python scripts/mutate_guard.py

coverage: .venv/.dev  ## branches of the guard and the wire that tests reach; fails below 95 % (docs/testing.md)
	rm -f .coverage
	NUMBA_DISABLE_JIT=1 $(COVERAGE) -W "ignore:overflow encountered:RuntimeWarning" $(UNCOMPILED)
	$(COVERAGE) -m "not slow" tests/trusted tests/wire tests/vectors
	$(BIN)/coverage report --show-missing --skip-covered
	$(BIN)/coverage json --quiet -o - | $(BIN)/python -m scripts.coverage_gate --floor 95 $(COVERED)

latest: .venv-latest/bin/python  ## the test suite against the newest release of everything but torch
	.venv-latest/bin/python -m pip --quiet --disable-pip-version-check install --upgrade --upgrade-strategy eager \
		--constraint constraints.txt --editable ".[dev]"
	.venv-latest/bin/python -m pytest -m "not slow" -W default::ResourceWarning \
		-W default::pytest.PytestUnraisableExceptionWarning -W default::pytest.PytestUnhandledThreadExceptionWarning

lock: .venv-lock/bin/uv  ## move requirements/*.lock to the newest releases that pyproject.toml and constraints.txt allow
	$(PYTHON) scripts/lock.py .venv-lock/bin/uv

conformance: .venv/.dev .venv-conformance/.clients conformance/node/node_modules/.package-lock.json  ## clients and tools that others made, against a real server
	$(CLIENTS) -m pytest -c conformance/pytest.ini --rootdir . conformance

conformance-lock: .venv-lock/bin/uv  ## move the clients to their newest releases
	.venv-lock/bin/uv pip compile conformance/requirements.in --universal --fork-strategy fewest --python-version 3.11 \
		--only-binary :all: --override conformance/overrides.txt --generate-hashes --upgrade --quiet --no-annotate \
		--no-header --no-emit-index-url --no-emit-find-links --output-file conformance/requirements.lock
	$(NPM) update --package-lock-only

bench: .venv/.dev  ## measure everything, into benchmarks/results/, and write the README's table and plots from it
	$(BIN)/tsqp bench all
	$(BIN)/tsqp bench private --mode masked_drained --tokens 16 --steps 256 --runs 3 --results benchmarks/results
	$(BIN)/tsqp bench offload --results benchmarks/results
	$(BIN)/tsqp bench load --results benchmarks/results
	$(BIN)/tsqp bench serve --no-http --results benchmarks/results
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.readme

gpu-check: .venv/.dev  ## every CUDA test and benchmark in at most 8 minutes, on a machine with a GPU and a network (docs/gpu-check.md)
	$(BIN)/python -m benchmarks.gpu_check

gpu-bundle: .venv/.dev  ## the same without a network: wheels into .gpu-wheels, and the one line to run there
	$(BIN)/python -m scripts.gpu_bundle

wheel: .venv/.dev
	$(BIN)/python -m build --no-isolation --wheel --outdir dist

sbom: .venv-sbom/.tools  ## what is installed, by hashes, with version and commit: CycloneDX JSON
	.venv-sbom/bin/python -W ignore::UserWarning scripts/sbom.py .venv-sbom/bin/cyclonedx-py $(SBOM)

sbom-lock: .venv-lock/bin/uv  ## move the maker of that to its newest release
	echo cyclonedx-bom | .venv-lock/bin/uv pip compile - --universal --fork-strategy fewest --python-version 3.11 \
		--only-binary :all: --generate-hashes --upgrade --quiet --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --output-file requirements/sbom.lock

image:  ## images of both sides and of a cluster's nodes, from BASE=NAME@sha256:DIGEST (docs/operations.md), by podman, docker or buildah
	$(PYTHON) scripts/image.py --torch-index "$(TORCH_INDEX)" "$(BASE)"

clean:
	rm -rf .venv .venv-conformance .venv-latest .venv-lock .venv-sbom .gpu-wheels conformance/node/node_modules dist build

.venv/bin/python .venv-conformance/bin/python .venv-latest/bin/python .venv-sbom/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or later: name one that is, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(@D:/bin=) || { rm -rf $(@D:/bin=); exit 1; }

.venv/.runtime: pyproject.toml constraints.txt requirements/run.lock | .venv/bin/python
	$(PIP) $(LOCKED) requirements/run.lock
	$(PIP) $(TORCH)
	$(PIP) $(OURSELVES)
	$(PIP) check
	touch $@

.venv/.dev: pyproject.toml constraints.txt requirements/dev.lock | .venv/bin/python
	$(PIP) $(LOCKED) requirements/dev.lock
	$(PIP) $(TORCH)
	$(PIP) $(OURSELVES)
	$(PIP) check
	touch $@ .venv/.runtime

.venv-conformance/.clients: conformance/requirements.lock | .venv-conformance/bin/python
	.venv-conformance/bin/python -m pip --quiet --disable-pip-version-check $(LOCKED) conformance/requirements.lock
	touch $@

.venv-sbom/.tools: requirements/sbom.lock | .venv-sbom/bin/python
	.venv-sbom/bin/python -m pip --quiet --disable-pip-version-check $(LOCKED) requirements/sbom.lock
	touch $@

conformance/node/node_modules/.package-lock.json: conformance/node/package-lock.json
	$(NPM) ci
	touch $@

.venv-lock/bin/uv: Makefile
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip --quiet --disable-pip-version-check install --only-binary=:all: $(UV)
	touch $@
