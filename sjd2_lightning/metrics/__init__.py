"""Metrics of images and of decoding; every result carries its interval, its N and its protocol."""
