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
        "bytes", (SourceConfig("it", "none", str(path), 1.0),), "text", 0.1, "concat", 0, 1
    )
    whole = path.read_bytes()
    found = compression.compressed_bits_per_byte([path.read_text()[:777], path.read_text()[777:]])
    sizes = len(gzip.compress(whole, 9)), len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME))
    assert [*found.values()] == pytest.approx([8 * size / len(whole) for size in sizes], rel=0.02)
    (text,) = compression.compare(Sources.open(data), {"it": 2 * found["gzip -9"]})
    assert text.num_bytes == len(whole) and text.compressors == found
    assert f"100.0% more than gzip -9 ({found['gzip -9']:.3f})" in str(text)
    header, row = compression.comparison_rows([text])
    assert header == ["held out", "bytes", "this model", "gzip -9", "xz -9e"]
    assert row[:3] == ["it", f"{len(whole):,}", f"{text.model:.3f}"]
    (text,) = compression.compare(Sources.open(data), {"it": None})
    assert str(text) == "Held-out it: no bits per byte"
    assert compression.comparison_rows([text])[1][2] == "none"
    assert compression.compressed_bits_per_byte([])["gzip -9"] > 0


def test_the_verdict_says_who_needs_fewer_bits():
    text = compression.Compared("code", 10, 1.8, {"gzip -9": 2.0, "xz -9e": 1.6})
    assert str(text) == (
        "Held-out code: 1.800 bits per byte, 10.0% less than gzip -9 (2.000), "
        "12.5% more than xz -9e (1.600)"
    )
