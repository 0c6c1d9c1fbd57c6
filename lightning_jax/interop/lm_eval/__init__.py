"""The lm-evaluation-harness: our models as its models."""
