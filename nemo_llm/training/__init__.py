"""The training run: setup, one step, the loop, checkpoints, metrics, signals and the run folder."""
