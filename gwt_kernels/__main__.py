"""``python -m gwt_kernels``."""

import sys

from gwt_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
