"""The held-out bytes under general compressors: a yardstick for bits per byte."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_jax.data.sources import Sources

_GZIP_FORMAT = 31  # zlib's number for it, with the largest window
COMPRESSORS = {
    "gzip -9": lambda: zlib.compressobj(9, wbits=_GZIP_FORMAT),
    "xz -9e": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
}


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Returns bits per UTF-8 byte of texts, compressed as one file, by compressor."""
    compressors = {name: make() for name, make in COMPRESSORS.items()}
    sizes, total = dict.fromkeys(compressors, 0), 0
    for text in texts:
        content = text.encode("utf-8")
        total += len(content)
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(content))
    return {
        name: 8 * (sizes[name] + len(compressor.flush())) / max(total, 1)
        for name, compressor in compressors.items()
    }


def compression_rows(
    sources: Sources, models: Mapping[str, Mapping[str, float | None]]
) -> list[list[Any]]:
    """Returns a table: a row per domain, with its bytes, each model's and each compressor's bits.

    Args:
      sources: their held-out text is compressed, each domain as one file.
      models: bits per byte by domain, by the model's name; None where there are none.
    """
    rows: list[list[Any]] = [["held out", "bytes", *models, *COMPRESSORS]]
    for name, source in sources.eval.items():
        measured = [bits[name] for bits in models.values()]
        ours = ["none" if bits is None else f"{bits:.3f}" for bits in measured]
        theirs = [f"{bits:.3f}" for bits in compressed_bits_per_byte(source.texts()).values()]
        rows.append([name, f"{source.num_bytes:,}", *ours, *theirs])
    return rows
