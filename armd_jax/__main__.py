"""`python -m armd_jax` is the command `armd`."""

import sys

from armd_jax.cli.main import main

sys.exit(main())
