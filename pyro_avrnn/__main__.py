"""``python -m pyro_avrnn``: the command line."""

import sys

from pyro_avrnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
