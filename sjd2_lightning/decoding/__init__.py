"""Decoding of the Jacobi family; needs torch and a backbone, nothing else.

>>> from sjd2_lightning.decoding import DecodingConfig, decode
>>> method = DecodingConfig("sjd2", num_levels=1)
>>> output = decode(backbone, ["red heart"], [0], method, backbone.layout(64, 64))
>>> sizes = [backbone.layout(64, 64), backbone.layout(32, 96)]  # one a prompt
>>> wide = decode(backbone, ["red heart", "blue car"], [0, 1], method, sizes).image_ids_by_row[1]

The words of this room:

    slot        a place of the image's sequence: an image code, or a structural token such as the end of a row
    draft       a slot's guess of its token, not yet committed
    window      the next W slots of a row, which one pass looks at together; its first slot is the head
    iteration   one forward pass of the loop, and what follows from it
    law         the probabilities of all codes in a slot, given what was fed to its left
    scores      the unnormalised logarithms of the laws
    lawless     without a law: scores hold NaN or +inf, or ban every code; decoding ends with an error
    rule        what says which drafts stand; its verdict is on every slot, as if all slots to its left stood
    stand       a draft stands if the rule accepts it; those at the left that do are the run
    commit      write a slot for good: the run, and the slot behind it
    again       committed slots that a pass feeds again, since the cache does not hold them as they are now
    level       a slot's amount of noise: 0 is clean, `num_levels` is pure noise
    engine      how passes are run: as they come, compiled, or captured as graphs
    column      where a slot, a prompt token or a timestep token lies in the cache

Read `reference` first (autoregression, slow and obvious), then `loop`, `passes`, `rules`, `levels`, `window`;
`drawing` and `engine` say how it is put together and run.
"""

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.decoding.loop import Decoder, Observer, decode
from sjd2_lightning.decoding.output import DecodeOutput, Iteration, NearTies
from sjd2_lightning.decoding.reference import decode_reference
from sjd2_lightning.fixed_point import DecodeStats

__all__ = [
    "DecodeOutput",
    "DecodeStats",
    "Decoder",
    "DecodingConfig",
    "Iteration",
    "NearTies",
    "Observer",
    "Sampling",
    "decode",
    "decode_reference",
]
