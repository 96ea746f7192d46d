"""`python -m kvp.check`: see `kvp.export.check`."""

from kvp.export.check import main

if __name__ == "__main__":
    main()
