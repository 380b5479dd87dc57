# Recipes for people who work on mpt_eqx. `just` lists them.

default:
    @just --list

# Install the package with everything that tests need.
setup:
    python -m pip install -e '.[dev]'

# The test suite; arguments go to pytest.
test *args:
    python -m pytest {{args}}

# Lint, formatting and types.
lint:
    ruff check .
    ruff format --check .
    mypy

# Format the code.
fmt:
    ruff check --fix .
    ruff format .

# What CI runs.
check: lint test

# Compare with transformers, live; needs the extra `reference`.
reference:
    python -m pytest -n0 tests/reference/compare_with_transformers.py

# Compare speed and memory with transformers and llama.cpp; needs the extras `bench` and `reference`, and a quiet machine.
bench *args:
    python -m benchmarks.speed --reference-size --output benchmarks/results {{args}}

# Train the shipped model anew, about an hour on two cores.
pretrain directory:
    python examples/pretrain.py {{directory}}
