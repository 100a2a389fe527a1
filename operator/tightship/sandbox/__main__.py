"""`python -m tightship.sandbox`: the same as `tightship sandbox`."""

import sys

from tightship.sandbox.cli import main

if __name__ == "__main__":
    sys.exit(main())
