"""The harness's own command line, which knows the model `mpt-eqx`: `python -m mpt_eqx.lm_eval run --tasks …`."""

import os


def main() -> None:
    """Runs it."""
    from lm_eval.__main__ import cli_evaluate

    # It would fork for its statistics, which JAX's threads do not survive.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    cli_evaluate()


if __name__ == "__main__":
    main()
