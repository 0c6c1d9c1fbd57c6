"""The held-out bytes under general compressors: a yardstick for bits per byte."""

from __future__ import annotations

import dataclasses
import lzma
import zlib
from collections.abc import Iterable, Mapping, Sequence

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


@dataclasses.dataclass(frozen=True)
class Compared:
    """The held-out text of one domain: what a model and the compressors make of the same bytes.

    Attributes:
      domain: its name.
      num_bytes: UTF-8 bytes of the text.
      model: bits per byte; None if they were not measured.
      compressors: bits per byte by compressor, the domain as one file.
    """

    domain: str
    num_bytes: int
    model: float | None
    compressors: Mapping[str, float]

    def __str__(self) -> str:
        if self.model is None:
            return f"Held-out {self.domain}: no bits per byte"
        parts = [
            f"{abs(self.model / theirs - 1):.1%} {'less' if self.model <= theirs else 'more'} than "
            f"{name} ({theirs:.3f})"
            for name, theirs in self.compressors.items()
        ]
        return f"Held-out {self.domain}: {self.model:.3f} bits per byte, {', '.join(parts)}"


def compare(sources: Sources, model: Mapping[str, float | None]) -> list[Compared]:
    """Compresses the held-out text of each source.

    Args:
      model: bits per byte by domain.
    """
    return [
        Compared(name, source.num_bytes, model.get(name), compressed_bits_per_byte(source.texts()))
        for name, source in sources.eval.items()
    ]


def comparison_rows(compared: Sequence[Compared]) -> list[list[str]]:
    """Returns a table, header first: a row per domain, with its bytes and everyone's bits."""
    rows = [["held out", "bytes", "this model", *COMPRESSORS]]
    for text in compared:
        ours = "none" if text.model is None else f"{text.model:.3f}"
        theirs = [f"{bits:.3f}" for bits in text.compressors.values()]
        rows.append([text.domain, f"{text.num_bytes:,}", ours, *theirs])
    return rows
