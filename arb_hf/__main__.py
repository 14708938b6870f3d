"""``python -m arb_hf``: the same as ``arb-hf``."""

import sys

from .cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
