"""`python -m kvp.status`: see `kvp.sweep.status`."""

from kvp.sweep.status import main

if __name__ == "__main__":
    main()
