"""The training loop and what it stands on: processes, checkpoints, run folders, curves."""
