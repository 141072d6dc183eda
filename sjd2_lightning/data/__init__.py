"""Data: captioned images, shards of image codes, and the loaders that feed training."""

import os

# read when webdataset is imported: no shell commands as addresses, no rewriting of addresses
os.environ["WDS_SECURE"] = "1"
