"""Suite `data`: the cost of opening a corpus at the first start of a run, and at the next.

Each start is a process of its own that opens one source, takes its fingerprint and makes the first
batch. The first start has an empty cache, the second the cache of the first. The corpus is one
made-up `.jsonl` with documents of the lengths of web text, in a temporary folder;
`--only=start_100_mb` chooses its size.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Options

SIZES_MB = (100, 1000)
_ROOT = Path(__file__).resolve().parents[1]
# Characters per document: log-normal, with a mean of 3,300 and a long tail.
_MEDIAN, _SIGMA = 1800, 1.1
_LETTERS = [*"etaoinshrdlucmfwypvbgkjqxzéü漢"]

_START = """
import json, sys, time

def peak_mb():
    # Of this program alone: getrusage counts what its parent had before exec.
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3

from configs import base
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
from lightning_jax.data.mixture import make_train_iterator
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer

imports = peak_mb()
begun, used = time.perf_counter(), time.process_time()
config = base.get_config()
config.data.sources = base.named(web=base.source(sys.argv[1]))
config.stages = base.named(one=base.stage(mixture=base.named(web=1.0), seq_len=1024))
config = build(RunConfig, config)
sources = Sources.open(config.data)
found = sources.fingerprint()["web"]
batches = make_train_iterator(
    sources, config.data, config.stages[0], tokenizer=ByteTokenizer(), seed=0
)
next(batches)
batches.close()
del batches
seconds, processor = time.perf_counter() - begun, time.process_time() - used
print(json.dumps({
    "documents": found["documents"] + found["eval_documents"], "s": seconds, "cpu_s": processor,
    "peak_mb": peak_mb(), "imports_mb": imports,
}))
"""


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: one per size, with seconds, processor seconds and peak memory of both starts."""
    rows = []
    for size in SIZES_MB:
        name = f"start_{size}_mb"
        if options.wants(name):
            with tempfile.TemporaryDirectory() as folder:
                corpus = Path(folder, "web.jsonl")
                write_corpus(corpus, size * 10**6)
                starts = [_both_starts(corpus) for _ in range(options.rounds)]
            rows.append(_row(name, size, starts))
    return rows


def write_corpus(path: Path, num_bytes: int, seed: int = 0) -> None:
    """Writes JSON lines of at least `num_bytes` in all: slices of one text of made-up words."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 11, 20_000)
    words = ["".join(generator.choice(_LETTERS, length)) for length in lengths]
    ranks = np.minimum(generator.zipf(1.3, 2_000_000), len(words)) - 1
    text = " ".join(words[rank] for rank in ranks)
    written = 0
    with path.open("wb") as file:
        while written < num_bytes:
            length = 1 + int(generator.lognormal(np.log(_MEDIAN), _SIGMA))
            start = int(generator.integers(max(len(text) - length, 1)))
            record = {"text": text[start : start + length], "url": f"https://example.com/{written}"}
            written += file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _both_starts(corpus: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as cache:
        return start(corpus, cache), start(corpus, cache)


def start(corpus: Path, cache: str) -> dict[str, Any]:
    """Opens a corpus in a process of its own: documents, `s`, `cpu_s`, `peak_mb`, `imports_mb`."""
    command = [sys.executable, "-c", _START, str(corpus)]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    result = subprocess.run(
        command, cwd=_ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout)


def _row(name: str, size: int, starts: list[tuple[dict[str, Any], ...]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "table": "open, fingerprint and first batch of one .jsonl",
        "name": name,
        "mb": size,
        "documents": starts[0][0]["documents"],
    }
    for which, of_rounds in zip(("first", "second"), zip(*starts, strict=True), strict=True):
        for unit in ("s", "cpu_s", "peak_mb"):
            row[f"{which}_{unit}"] = statistics.median(found[unit] for found in of_rounds)
    row["imports_mb"] = statistics.median(found["imports_mb"] for pair in starts for found in pair)
    return row
