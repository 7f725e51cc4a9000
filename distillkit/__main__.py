"""``python -m distillkit``; see :mod:`distillkit.cli`."""

import sys

from distillkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
