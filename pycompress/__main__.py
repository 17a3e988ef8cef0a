"""`python -m pycompress` is the command `pycompress`."""

from pycompress.cli import main

if __name__ == "__main__":
    main()
