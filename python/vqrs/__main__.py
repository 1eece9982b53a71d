"""``python -m vqrs``: the command line."""

import sys

from vqrs.cli import main

sys.exit(main())
