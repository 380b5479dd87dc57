# Recipes for people who work on mpt_eqx. `just` lists them.

default:
    @just --list

# Install the package with everything that tests need.
setup:
    python -m pip install -e '.[dev]'

# The tests but for the long proofs; arguments go to pytest: `just test tests/test_model.py -k alibi`. Most compile
# quickly; those of compiled code run as users do.
test *args:
    python -m pytest --quick {{args}}

# All tests, the long proofs (large files, crashes, long prompts) among them.
test-all *args:
    python -m pytest -m "" --hypothesis-profile=long {{args}}

# The tests in a fresh environment of another installed Python: `just test-python 3.13`.
test-python version *args:
    bash .ci/test-python {{version}} {{args}}

# Lint, formatting and types.
lint:
    ruff check .
    ruff format --check .
    mypy

# Format the code.
fmt:
    ruff check --fix .
    ruff format .

# Lint and tests.
check: lint test

# Build the documentation site into site/; a warning is an error. Needs the extra `docs`.
docs:
    bash .ci/docs

# Show the site at http://localhost:8000, rebuilt on every change.
docs-serve:
    zensical serve

# Compare with transformers and llama.cpp, live; needs the extras `reference` and `bench`.
reference:
    python -m pytest -n0 tests/reference/compare_with_transformers.py
    python -m pytest -n0 tests/reference/compare_conversions.py

# Compare speed and memory with transformers and llama.cpp; needs the extras `bench` and `reference`, and a quiet machine.
bench *args:
    python -m benchmarks.speed --reference-size --output benchmarks/results {{args}}

# Train the shipped model anew, about an hour on two cores.
pretrain directory:
    python examples/pretrain.py {{directory}}
