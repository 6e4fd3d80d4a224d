"""`python -m paramend` is the command `paramend`."""

from paramend.cli.main import main

if __name__ == "__main__":
    main()
