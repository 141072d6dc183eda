"""The old address of `sjd2 teacher`, for one release."""

from sjd2_lightning.cli.teacher import main

if __name__ == "__main__":
    main()
