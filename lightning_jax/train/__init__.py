"""Training: plan, step, optimizer, placement, metrics, evaluation, session, loop."""
