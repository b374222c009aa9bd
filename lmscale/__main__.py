"""`python -m lmscale VERB ...`: the same program as the console script `lmscale`."""

from lmscale.cli import main

if __name__ == "__main__":
    main()
