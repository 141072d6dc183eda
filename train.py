"""Fine-tune a backbone: `python train.py --help`; see conf/train.yaml."""

from sjd2_lightning.cli.train import main

if __name__ == "__main__":
    main()
