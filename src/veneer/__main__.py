"""`python -m veneer`, which `torchrun -m veneer` needs."""

import sys

from veneer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
