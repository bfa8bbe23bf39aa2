"""python -m memsvc.cli."""

from memsvc.cli.main import main

if __name__ == "__main__":
    main()
