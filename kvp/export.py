"""`python -m kvp.export`: see `kvp.serving.__main__`."""

from kvp.serving.__main__ import main

if __name__ == "__main__":
    main()
