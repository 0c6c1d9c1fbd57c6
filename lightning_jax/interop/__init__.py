"""In and out: weights of other frameworks, and harnesses that judge our models."""
