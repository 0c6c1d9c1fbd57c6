"""The card of a run: one HTML file that says what the model is, learned, saves and cost.

facts = card.read("runs/quickstart")
card.write(facts)                      # runs/quickstart/card.html
"""

from lightning_jax.card.facts import Facts, is_run, read
from lightning_jax.card.page import last_words, print_tables, write

__all__ = ["Facts", "is_run", "last_words", "print_tables", "read", "write"]
