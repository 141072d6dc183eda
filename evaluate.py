"""Compare decoding methods: `python evaluate.py --help`; see conf/evaluate.yaml."""

from sjd2_lightning.cli.evaluate import main

if __name__ == "__main__":
    main()
