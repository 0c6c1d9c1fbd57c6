import gzip
import lzma

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.data import compression
from lightning_jax.data.sources import Sources


def test_streams_are_as_small_as_the_whole_text_compressed_at_once(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text é\n" * 500)
    data = DataConfig(
        "bytes", (SourceConfig("it", "none", str(path)),), "text", 0.1, "concat", 0, 1
    )
    whole = path.read_bytes()
    found = compression.compressed_bits_per_byte([path.read_text()[:777], path.read_text()[777:]])
    sizes = len(gzip.compress(whole, 9)), len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME))
    assert [*found.values()] == pytest.approx([8 * size / len(whole) for size in sizes], rel=0.02)
    header, row = compression.compression_rows(Sources.open(data), {"ours": {"it": 1.5}})
    assert header == ["held out", "bytes", "ours", "gzip -9", "xz -9e"]
    assert row[:3] == ["it", f"{len(whole):,}", "1.500"]
    _, row = compression.compression_rows(Sources.open(data), {"ours": {"it": None}})
    assert row[2] == "none"
    assert compression.compressed_bits_per_byte([])["gzip -9"] > 0
