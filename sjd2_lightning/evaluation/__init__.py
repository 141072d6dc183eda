"""Methods side by side on the same prompts and seeds: images on disk, then results."""
