"""Speculative Jacobi-Denoising Decoding (SJD2): training and decoding of autoregressive text-to-image models.

The package imports nothing on its own: `sjd2_lightning.decoding` needs only torch, training needs Lightning,
and each part is imported from its module.
"""

__version__ = "0.1.0"
