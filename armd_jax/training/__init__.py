"""Training: state, step, loop, optimizer, sharding, checkpoints and metric writers."""
