"""Every command, one file each, and what they are built from."""
