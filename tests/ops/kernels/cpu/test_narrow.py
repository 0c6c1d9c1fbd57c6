import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.kernels.cpu import narrow
from tests.targets import TPU


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Writes what the processor says of itself, and forgets what it said before."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(narrow, "_CPUINFO", path)
    narrow._this_cpu_multiplies_bfloat16.cache_clear()
    yield path
    narrow._this_cpu_multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("model name\t: x\nflags\t\t: fpu avx2 avx512_bf16 sse\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2\n", False),
        ("", False),
        (None, False),
    ],
)
def test_the_processor_is_asked_what_it_multiplies(cpuinfo, text, answer):
    if text is not None:
        cpuinfo.write_text(text)
    assert narrow.multiplies_bfloat16() == answer
    x = jnp.ones(2, jnp.bfloat16)
    assert narrow.operand(x, jnp.bfloat16).dtype == (jnp.bfloat16 if answer else jnp.float32)
    assert narrow.operand(x.astype(jnp.float32), jnp.float32).dtype == jnp.float32


def test_other_devices_multiply_bfloat16(cpuinfo):
    cpuinfo.write_text("flags\t\t: fpu avx2\n")
    with jax.sharding.use_abstract_mesh(TPU):
        assert narrow.multiplies_bfloat16()


def test_an_operand_is_rounded_whatever_it_is_multiplied_in():
    x = jnp.linspace(0.1, 1.0, 7)
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(narrow.operand(x, jnp.bfloat16).astype(jnp.float32), rounded)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_put_writes_rows_and_bits_return_unchanged(dtype):
    buffer = jnp.arange(24, dtype=dtype).reshape(6, 4)
    rows = jnp.full((2, 4), 0.3)
    bits = jax.jit(lambda b: narrow.put(narrow.to_bits(b), rows, 3, dtype))(buffer)
    expected = np.array(buffer, np.float32)
    expected[3:5] = np.asarray(rows.astype(dtype), np.float32)
    got = narrow.from_bits(bits, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(jnp.float32), expected)


def test_a_loop_that_puts_bfloat16_converts_no_whole_buffer():
    def fill(buffer):
        row = jnp.ones((1, buffer.shape[1]))
        body = lambda i, bits: narrow.put(bits, row, i, jnp.bfloat16)  # noqa: E731
        bits = jax.lax.fori_loop(0, buffer.shape[0], body, narrow.to_bits(buffer))
        return narrow.from_bits(bits, jnp.bfloat16)

    text = jax.jit(fill).lower(jnp.zeros((64, 32), jnp.bfloat16)).compile().as_text()
    assert "f32[64,32]" not in text
