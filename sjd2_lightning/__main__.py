"""`python -m sjd2_lightning COMMAND ...`: the same as `sjd2 COMMAND ...`."""

from sjd2_lightning.cli.commands import main

if __name__ == "__main__":
    main()
