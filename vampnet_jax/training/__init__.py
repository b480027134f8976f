"""Training: token folders, objective, step, loop and checkpoints. Needs the extra `train`."""
