"""The old address of `sjd2 prepare`, for one release."""

from sjd2_lightning.cli.prepare import main

if __name__ == "__main__":
    main()
