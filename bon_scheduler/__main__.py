"""`python -m bon_scheduler`: the command line."""

from bon_scheduler.cli.app import main

if __name__ == "__main__":
    main()
