"""Pre-training: state, optimiser, step, loop, checkpoints, metrics and the report."""
