"""python -m model_adapter."""

import sys

from model_adapter.main import main

if __name__ == "__main__":
    sys.exit(main())
