"""The two commands: train and evaluate."""
