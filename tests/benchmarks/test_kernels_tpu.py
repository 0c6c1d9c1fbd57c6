import importlib.util

import numpy as np
import pytest

from benchmarks import kernels_tpu, tpu_splash, tpu_static
from lightning_jax.ops.kernels.tpu.band import Band, BlockSizes

PROGRAM = """
ENTRY %main (q: bf16[8]) -> bf16[8] {
  %q = bf16[8]{0} parameter(0)
  %attend.1 = (bf16[8]{0}, f32[8]{0}) custom-call(%q), custom_call_target="tpu_custom_call",
    backend_config={"used_scoped_memory_configs":[{"size":"2048"},{"size":"1024"}],
    "bundle_analysis_data":{"estimated_cycles":"120","flops":"0"}}
  ROOT %fused = bf16[8]{0} fusion(%attend.1), backend_config={"bundle_analysis_data":{"estimated_cycles":"7"}}
}
"""  # noqa: E501


def _band(length, window, tile=128, tiles=2, visit=2):
    return Band(
        length=length,
        offset=0,
        window=min(window, length),
        kv_heads=1,
        group=1,
        head_size=128,
        scale=1.0,
        softcap=None,
        segments=False,
        sinks=False,
        blocks=BlockSizes(tile, tiles, 1, visit),
        fast_memory=2**27,
        interpret=True,
    )


def test_cycles_and_memory_are_read_from_the_program():
    assert tpu_static._cycles(PROGRAM) == {"attend.1": (120, 3072), "fused": (7, 0)}


@pytest.mark.parametrize("window", [1, 100, 128, 256, 500, 512, 1024, 2048])
def test_pairs_that_should_run_are_those_with_something_visible(window):
    length, tile = 2048, 128
    band = _band(length, window)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = (distance >= 0) & (distance < window)
    tiles = visible.reshape(length // tile, tile, length // tile, tile).any((1, 3))
    in_code, ran = kernels_tpu._pairs(band)
    assert ran == tiles.sum()
    assert in_code >= 1


@pytest.mark.parametrize("window", [100, 512])
def test_splash_visits_what_its_mask_shows(window):
    length, block = 1024, 128
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = (distance >= 0) & (distance < window)
    blocks = visible.reshape(length // block, block, length // block, block).any((1, 3))
    assert tpu_splash.visited(length, window, block, block) == blocks.sum()


def test_every_case_builds_and_useful_work_is_counted():
    for chip in tpu_static.CHIPS:
        cases = kernels_tpu.cases(chip)
        label = "x".join(map(str, kernels_tpu.SHAPES[0]))
        heads, length, window = kernels_tpu.SHAPES[0]
        pairs = heads * (window * (window + 1) // 2 + (length - window) * window)
        assert cases[f"ours_forward_{label}"]().flops == 4 * 128 * pairs
        assert cases[f"ours_backward_{label}"]().flops == 10 * 128 * pairs


def test_ratio_is_ours_over_the_fastest_splash():
    label = "x".join(map(str, kernels_tpu.SHAPES[0]))
    rows = [
        {"name": f"v6e_{name}_{label}", "cycles": cycles}
        for name, cycles in {
            "ours_forward": 100,
            "ours_backward": 200,
            "splash_512x512x512_forward": 250,
            "splash_1024x1024x512_forward": 200,
            "splash_512x512x512_both": 600,
        }.items()
    ]
    ratios = {row["name"]: row["ratio"] for row in kernels_tpu._ratios(rows, {})}
    assert ratios == {f"v6e_forward_{label}": 0.5, f"v6e_both_{label}": 0.5}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-aot)"
)
def test_profile_of_a_small_case_ran_every_pair():
    name = f"ours_forward_{kernels_tpu._label(kernels_tpu.TRACED)}"
    row = tpu_static.measure(kernels_tpu.__name__, name, "v5e", trace=True)
    assert row["executed"] == pytest.approx(1.0, abs=0.02)
    assert 0.2 < row["mxu"] < 1.0
    assert all(0 < row[f"{unit}_slots"] < 1 for unit in ("mxu", "valu", "eup"))
