"""Tests of sjd2_lightning; the folders mirror the package."""
