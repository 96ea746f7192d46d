"""`python -m kvp.check`: see `kvp.serving.check`."""

from kvp.serving.check import main

if __name__ == "__main__":
    main()
