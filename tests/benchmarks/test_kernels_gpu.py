import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_correctness, gpu_decoding, gpu_experts, gpu_timing, kernels_gpu
from benchmarks.measure import Options
from lightning_jax.config.errors import UserError
from lightning_jax.ops.kernels.gpu import decode as gpu_decode
from lightning_jax.ops.kernels.gpu import forward as gpu_forward
from lightning_jax.ops.kernels.gpu.attention import sliding_window_attention
from tests.ops.kernels.dense_attention import dense_attention, window_mask


def test_without_a_gpu_it_says_so_in_one_line():
    with pytest.raises(
        UserError, match="suite=kernels_gpu: needs an NVIDIA GPU.*only cpu"
    ) as error:
        kernels_gpu.run(Options())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("window", [1, 50, 1000])
def test_useful_work_is_that_of_the_visible_pairs(window):
    segments = kernels_gpu.documents(2, 300, 60)
    pairs = window_mask(300, window, segments).sum()
    per_pair = 4 * kernels_gpu.QUERY_HEADS * kernels_gpu.HEAD_DIM
    assert kernels_gpu.useful_flops(segments, window, "forward") == per_pair * pairs
    assert kernels_gpu.useful_flops(segments, window, "forward+backward") == 3.5 * per_pair * pairs


def test_the_reference_of_the_correctness_table():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 40, heads, 8))) for heads in (4, 2, 2))
    segments, sinks = kernels_gpu.documents(2, 40, 16) - 1, np.linspace(-1, 2, 4)
    found = gpu_correctness.dense(
        query, key, value, jnp.asarray(sinks), window=9, segments_BS=jnp.asarray(segments), cap=2.0
    )
    expected, _ = dense_attention(
        query,
        key,
        value,
        np.zeros(query.shape),
        visible_BTS=window_mask(40, 9, segments),
        scale=8**-0.5,
        sinks=sinks,
        softcap=2.0,
    )
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


@pytest.mark.slow
def test_correctness_rows_tell_right_from_wrong(monkeypatch):
    interpreted = functools.partial(sliding_window_attention, interpret=True)
    monkeypatch.setattr(gpu_correctness, "sliding_window_attention", interpreted)
    monkeypatch.setattr(
        gpu_correctness, "CASES", ((70, 4, 2, 16, True, True, 20.0, "bfloat16", 90),)
    )
    monkeypatch.setattr(gpu_correctness, "_LENGTH", 200)
    options = Options(only=("H16",))
    [row] = gpu_correctness.correctness_rows(options)
    assert row["ok"] and row["same_bits"]
    assert 0 < row["dkey"] <= row["limit"]
    off_by_one = functools.partial(_other_window, interpreted)
    monkeypatch.setattr(gpu_correctness, "sliding_window_attention", off_by_one)
    [row] = gpu_correctness.correctness_rows(options)
    assert not row["ok"]


def _other_window(attend, *arrays, window, **options):
    return attend(*arrays, window=window - 1, **options)


def _small_decoding(monkeypatch):
    for name in ("ring_decode", "paged_decode"):
        interpreted = functools.partial(getattr(gpu_decode, name), interpret=True)
        monkeypatch.setattr(gpu_decoding, name, interpreted)
    sizes = {"BATCH": 2, "QUERY_HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 16, "PAGE": 8, "LENGTH": 64}
    for name, size in (sizes | {"WINDOWS": (24,), "_COPIED": 2**12}).items():
        monkeypatch.setattr(gpu_decoding, name, size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode_rows_compare_with_the_dense_mask(monkeypatch, dtype):
    _small_decoding(monkeypatch)
    for _, error in (gpu_decoding._ring(24, dtype), gpu_decoding._pages(24, dtype)):
        assert 0 < error < 2e-2


@pytest.mark.slow
def test_tables_of_speed_on_tiny_shapes(monkeypatch):
    _small_decoding(monkeypatch)
    sizes = {"BATCH": 1, "QUERY_HEADS": 2, "KV_HEADS": 1, "HEAD_DIM": 16, "LENGTH": 256}
    for name, size in (sizes | {"WINDOWS": (64,), "MEAN_DOCUMENT": 64}).items():
        monkeypatch.setattr(kernels_gpu, name, size)
    monkeypatch.setattr(kernels_gpu, "_CANDIDATES", {"dquery": [(32, 32, 4, 1)]})
    monkeypatch.setattr(gpu_timing, "_PROBE_SIZE", 64)
    interpreted = functools.partial(sliding_window_attention, interpret=True)
    monkeypatch.setattr(kernels_gpu, "sliding_window_attention", interpreted)
    scores = gpu_forward.Scores
    monkeypatch.setattr(gpu_forward, "Scores", lambda scale, cap, _: scores(scale, cap, True))
    monkeypatch.setattr(kernels_gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(kernels_gpu, "peer", lambda name: None)
    only = ("attention_forward_64", "decode_ring_24_int8", "tiles_dquery")
    rows = {row["table"]: row for row in kernels_gpu.run(Options(rounds=2, only=only))}
    attention, decode, tiles = rows["attention"], rows["decode"], rows["tiles"]
    assert len(rows) == 3
    assert attention["ours_tflops"] > 0
    assert "torch: not installed" in attention["note"] and "cudnn: " in attention["note"]
    assert decode["ok"] and decode["of_copy"] > 0
    assert tiles["name"] == "tiles_dquery_32x32_w4_s1" and tiles["of_peak"] > 0


@pytest.mark.slow
def test_grouped_matmuls_are_timed_with_uneven_groups(monkeypatch):
    monkeypatch.setattr(gpu_experts, "SHAPES", ((64, 16, 32, 4),))
    monkeypatch.setattr(gpu_experts, "OURS", "blocked")
    monkeypatch.setattr(gpu_experts, "peer", lambda name: None)
    monkeypatch.setattr(gpu_timing, "_PROBE_SIZE", 64)
    rows = gpu_experts.experts_rows(Options(rounds=2))
    assert [row["name"].split("_")[1] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row["ours_tflops"] > 0 and row["vs_ragged_dot"] > 0 and "torch" in row["note"]
    size_E = gpu_experts.group_sizes(8192, 16)
    assert size_E.sum() == 8192 and size_E.min() == 0 and size_E.max() > 2048


@pytest.mark.slow
def test_the_grouped_matmuls_of_torch_compute_what_ours_do():
    torch = pytest.importorskip("torch")
    size_E, arrays = gpu_experts.group_sizes(64, 4), gpu_experts._arrays(64, 16, 32, 4)
    found = gpu_experts.torch_call("forward+backward", size_E, arrays, "cpu")()
    wanted = gpu_experts._ours("forward+backward", size_E, arrays, "onehot")()
    for a, b in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        b = torch.from_numpy(np.array(b, np.float32))
        assert (a.float() - b).abs().max() < 3e-2 * b.abs().max()


def test_a_row_that_fails_is_a_row_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(gpu_experts, "SHAPES", ((64, 16, 32, 4),))
    monkeypatch.setattr(gpu_experts, "_OTHERS", ())
    monkeypatch.setattr(gpu_experts, "peer", lambda name: None)
    (row,) = gpu_experts.experts_rows(Options(rounds=1, only=("experts_forward_",)))
    assert row["name"] == "experts_forward_S64_D16_F32_E4" and not row["ok"]
    assert row["note"].startswith("RuntimeError: ValueError: ")
    assert json.loads(capsys.readouterr().err) == row


def test_what_does_not_run_is_named_and_costs_nothing_else():
    def refuse():
        raise ValueError("no shared memory\nand a long story")

    calls, reasons = gpu_timing.runnable({"good": lambda: lambda: 1, "bad": refuse})
    assert list(calls) == ["good"]
    assert gpu_timing.note(reasons) == {"note": "bad: ValueError: no shared memory"}
