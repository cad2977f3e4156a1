"""`python -m zops` is `zops`."""

from zops.cli.main import main

if __name__ == "__main__":
    main()
