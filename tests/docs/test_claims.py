"""What README and findings say was measured is in the files that the commands wrote."""

import json

import pytest

from tests.docs.blocks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SWEEPS = sorted((RESULTS / "sweeps").glob("*.json"))


def rows(suite):
    found = json.loads((RESULTS / f"{suite}.json").read_text())["rows"]
    return {row["name"]: row for row in found}


def sweep(name):
    """The report of a shipped sweep, its arms and inferences by their names."""
    found = json.loads((RESULTS / "sweeps" / f"{name}.json").read_text())
    arms = {arm["arm"]: arm for arm in found["arms"]}
    ways = {(row["arm"], row["way"]): row for row in found["inference"]}
    return {"arms": arms, "inference": ways}


def fit(slice_):
    """Share of a chip's memory that the train step of the large model takes."""
    found = json.loads((RESULTS / f"aot_yi_{slice_}.json").read_text())
    memory = found["programs"]["train"]["memory"]
    return found["programs"]["train"]["fits"], memory["peak"] / memory["hbm"]


ATTENTION = rows("attention")["forward_float32_4096_512"]
MOE = rows("moe")
SERVE = rows("serve_small")
STARTUP = rows("startup")["startup"]
MINUTES = rows("first_minutes")
QUICKSTART = MINUTES["make quickstart"]
PAIRS = sweep("kv_sharing")["arms"]["global_pairs"]["difference"]
FEWER = sweep("routing")["inference"]["top_p_controlled", "top_p_0.3"]
CLAIMS = {
    "README.md": [
        f"{PAIRS['verdict']} within 0.5% (95%: {-PAIRS['percent']['low']:.2f}% fewer to "
        f"{PAIRS['percent']['high']:.2f}% more bits per byte",
        f"with {FEWER['experts_per_token']:.2f}: {FEWER['percent']['mean']:.2f}% more bits",
        f"{QUICKSTART['code_bits_per_byte']:.2f} bits per byte of held-out code",
        f"{MINUTES['end']['minutes']:.1f} minutes from the clone",
        f"{ATTENTION['vs_jax']:.1f} times as fast as `jax.nn`",
        f"{ATTENTION['vs_torch_full']:.1f} times torch's full attention",
        f"{SERVE['decode float32 experts 32 over 8']['ratio']:.2f} times as long as with 8",
        f"{MOE['top_p_forward']['all_over_half']:.2f} times as fast forward",
        f"{MOE['top_p_forward+backward']['all_over_half']:.2f} with gradients",
        f"{STARTUP['warm_s']:.1f} s to the first line of metrics",
        f"transformers {STARTUP['transformers_s']:.1f} s",
    ],
    "docs/findings.md": [
        f"takes {ATTENTION['ours_ms']:.1f} ms",
        f"{SERVE['decode float32 room 16384 over 512']['ratio']:.2f} times what 512 take",
        f"{SERVE['decode bfloat16 experts 32 over 8']['ratio']:.2f} in bfloat16",
        f"of {STARTUP['cold_s']:.1f} s",
        f"comes after {STARTUP['warm_s']:.1f} s",
    ],
}


@pytest.mark.parametrize("page", CLAIMS)
def test_claims_are_what_was_measured(page):
    text = (ROOT / page).read_text()
    assert not [claim for claim in CLAIMS[page] if claim not in text]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_findings_say_of_a_sweep_what_its_report_says(path):
    text = (ROOT / "docs" / "findings.md").read_text()
    report = json.loads(path.read_text())
    compared = [arm for arm in report["arms"] if arm["seeds"] and arm["arm"] != report["baseline"]]
    assert compared
    assert not [arm["sentence"] for arm in compared if arm["sentence"] not in text]


def test_the_large_model_fits_where_the_pages_say_so():
    fits, share = fit("v5p_256")
    assert fits and 0.4 < share < 0.55
    assert not fit("v5e_256")[0] and not fit("v6e_256")[0]
