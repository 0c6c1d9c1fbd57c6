"""Training: optimizer, schedule, step, stages, metrics, loop."""
