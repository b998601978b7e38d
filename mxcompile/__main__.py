"""`python -m mxcompile`."""

from mxcompile.cli.main import main

if __name__ == "__main__":
    main()
