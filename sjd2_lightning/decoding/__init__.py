"""Decoding of the Jacobi family; needs torch and a backbone, nothing else.

>>> from sjd2_lightning.decoding import DecodingConfig, decode
>>> method = DecodingConfig("sjd2", num_levels=1)
>>> output = decode(backbone, ["red heart"], [0], method, backbone.layout(64, 64))
>>> sizes = [backbone.layout(64, 64), backbone.layout(32, 96)]  # one a prompt
>>> wide = decode(backbone, ["red heart", "blue car"], [0, 1], method, sizes).image_ids_by_row[1]
"""

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.decoding.loop import Observer, decode
from sjd2_lightning.decoding.output import DecodeOutput, DecodeStats, Iteration, NearTies
from sjd2_lightning.decoding.reference import decode_reference

__all__ = [
    "DecodeOutput",
    "DecodeStats",
    "DecodingConfig",
    "Iteration",
    "NearTies",
    "Observer",
    "Sampling",
    "decode",
    "decode_reference",
]
