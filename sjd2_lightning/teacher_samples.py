"""The old address of `sjd2 teacher`, for one release."""

import sys

from sjd2_lightning.__main__ import main

if __name__ == "__main__":
    main(["teacher", *sys.argv[1:]])
