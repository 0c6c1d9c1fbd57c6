"""Hugging Face folders: `load` and `save` models of published families, and our own layout."""

from lightning_jax.interop.hf.models import Imported, load, save

__all__ = ["Imported", "load", "save"]
