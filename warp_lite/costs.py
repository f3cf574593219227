"""`python -m warp_lite.costs`: what a scheme of iterations costs, from scale/costs.py."""

import sys

from .scale.costs import main

if __name__ == "__main__":
    sys.exit(main())
