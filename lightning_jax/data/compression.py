"""What general compressors make of the held-out bytes: the yardstick beside bits per byte."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Mapping
from typing import Any

from lightning_jax.config import DataConfig
from lightning_jax.data.mixture import held_out_text

COMPRESSORS = {
    "gzip -9": lambda text: gzip.compress(text, compresslevel=9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Returns the bits a byte of `text`, compressed as one file, by compressor."""
    return {
        name: 8 * len(compress(text)) / max(len(text), 1) for name, compress in COMPRESSORS.items()
    }


def compression_rows(
    data: DataConfig, models: Mapping[str, Mapping[str, float]]
) -> list[list[Any]]:
    """Returns a table: a row a domain, with its bytes, each model's and each compressor's bits.

    Args:
      data: whose held-out text is compressed, each domain as one file.
      models: bits per byte by domain, by the model's name.
    """
    rows: list[list[Any]] = [["held out", "bytes", *models, *COMPRESSORS]]
    for name, text in held_out_text(data).items():
        ours = [f"{bits[name]:.3f}" for bits in models.values()]
        theirs = [f"{bits:.3f}" for bits in compressed_bits_per_byte(text).values()]
        rows.append([name, f"{len(text):,}", *ours, *theirs])
    return rows
