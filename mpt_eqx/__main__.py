"""`python -m mpt_eqx`: the command line."""

import sys

from mpt_eqx.cli import main

sys.exit(main())
