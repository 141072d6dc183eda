"""The old address of `sjd2 pairs`, for one release."""

from sjd2_lightning.cli.pairs import main

if __name__ == "__main__":
    main()
