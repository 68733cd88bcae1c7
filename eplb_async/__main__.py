"""`python -m eplb_async` is the command `eplb-async`."""

from eplb_async.runtime.cli import main

if __name__ == "__main__":
    main()
