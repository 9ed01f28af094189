"""`python -m tlexport` and the `tlexport` command."""

from tlexport.cli import main

if __name__ == "__main__":
    main()
