"""metrics.jsonl and TensorBoard: what is written, and what a resumed run drops."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from lightning_jax.config.errors import UserError
from lightning_jax.train.metrics import MetricsWriter, flatten, pace, read_rows


def write(workdir, rows, resume_step=0):
    with MetricsWriter(workdir, resume_step=resume_step) as writer:
        for row in rows:
            writer.write(row)


def events(workdir):
    found = EventAccumulator(str(workdir / "tensorboard"))
    found.Reload()
    return found


def tensors(workdir, name):
    return [(event.step, event.tensor_proto) for event in events(workdir).Tensors(name)]


def test_flatten_makes_json_of_arrays():
    router = {"mean_experts": np.ones((2, 3)), "histogram": np.ones((2, 3, 5))}
    metrics = {"loss": np.float32(2.5), "bad_steps": np.int32(1), "router": router}
    row = flatten({**metrics, "grad_norm": np.float32(np.inf), "objective": np.float32(np.nan)})
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["loss"] == 2.5 and row["bad_steps"] == 1
    assert row["grad_norm"] is None and row["objective"] is None
    assert row["mean_experts"] == [1.0] * 6
    assert row["histogram"] == [[1.0] * 5] * 6


# Case B6
def test_counts_by_source_are_one_group_of_tensorboard(tmp_path):
    counts = {"code": {"tokens": 2**40, "epochs": 0.5}, "docs": {"tokens": 3, "epochs": 2.0}}
    write(tmp_path, [{"step": 1, **flatten({"loss": np.float32(1), "data": counts})}])
    assert read_rows(tmp_path / "metrics.jsonl")[0]["data"] == counts
    names = {f"text/{name}/{count}" for name in counts for count in ("tokens", "epochs")}
    assert names <= set(events(tmp_path).Tags()["tensors"])


# Case D3
def test_what_is_not_finite_is_null_at_every_depth(tmp_path):
    nan, inf = float("nan"), float("inf")
    router = {"mean_experts": np.array([[1.0, np.nan]]), "histogram": np.full((1, 2, 3), np.inf)}
    row = flatten({"loss": np.float32(nan), "router": router})
    assert row == {"loss": None, "mean_experts": [1.0, None], "histogram": [[None] * 3] * 2}
    row |= {"step": 3, "eval": {"a": {"loss": nan, "by": {"0-15": inf}, "layers": [2.0, -inf]}}}
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write(row)
        for key in ("mean_experts", "histogram"):
            writer.histogram(f"router/{key}", row[key], 3)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    [read] = read_rows(tmp_path / "metrics.jsonl")
    assert read["eval"] == {"a": {"loss": None, "by": {"0-15": None}, "layers": [2.0, None]}}
    [(_, value)] = tensors(tmp_path, "router/mean_experts/max")
    assert value.float_val[0] == 1.0
    assert "router/histogram" not in events(tmp_path).Tags()["tensors"]


def test_each_row_is_on_disk_when_it_is_written(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        # What TensorBoard imports must not delay the first step.
        assert not (tmp_path / "tensorboard").exists()
        for step in (1, 2):
            writer.write({"step": step, "loss": 3.0 - step})
            assert len(read_rows(tmp_path / "metrics.jsonl")) == step


def test_a_resumed_run_drops_the_rows_that_it_writes_again(tmp_path):
    write(tmp_path, [{"step": step, "loss": 0.5 * step} for step in range(1, 6)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # A kill in the middle of a line.
    write(tmp_path, [{"step": 4, "loss": 9.0}], resume_step=3)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]
    assert not list(tmp_path.glob("*.tmp"))


def test_histograms_texts_and_the_config(tmp_path):
    with MetricsWriter(tmp_path, resume_step=2, config={"seed": 7}) as writer:
        writer.histogram("params/absmax", [[1.0, 2.0]], 3)
        writer.sample("def f():", 3)
    assert set(events(tmp_path).Tags()["tensors"]) == {"params/absmax", "sample", "config"}
    [(_, text)] = tensors(tmp_path, "sample")
    assert b"```\ndef f():\n```" in text.string_val[0]
    [(step, text)] = tensors(tmp_path, "config")
    assert step == 2 and b'"seed": 7' in text.string_val[0]


# Case F2
def test_a_file_in_the_place_of_the_tensorboard_folder_is_found_before_the_first_step(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="tensorboard: must be a folder"):
        MetricsWriter(tmp_path, resume_step=0)


# Case E4
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 1000, "not JSON"),
        (b'{"step": 2, "loss": NaN}', r"not JSON \(NaN is not a finite number\)"),
        (b'{"step": 2, "loss": 1e999}', r"not JSON \(1e999 is not a finite number\)"),
        (b'{"step": \xff}', r"not UTF-8 \(byte 9\)"),
        (b"[2]", "must be a JSON object, not list"),
        (b'{"loss": 2.0}', "lacks step; it has one of loss"),
        (b'{"step": "2"}', r"step = '2': must be a whole number in \[0, "),
        (b'{"step": 2.5}', r"step = 2.5: must be a whole number"),
        (b'{"step": true}', "step = True: must be a whole number"),
        (b'{"step": -1}', "step = -1: must be a whole number"),
        (b'{"step": 1' + b"0" * 30 + b"}", "step = 10*: must be a whole number"),
        (b'{"step": 2, "tokens": null}', "tokens = None: must be a whole number"),
        (b'{"step": 2, "loss": [1]}', r"loss = \[1\]: must be a finite number, or null"),
        (b'{"step": 2, "eval": 3}', "eval = 3: must be an object"),
        (b'{"step": 2, "loss": 1, "tokens_per_second": 9}', "lacks tokens"),
    ],
)
def test_a_damaged_line_is_one_line_of_error(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    for last in (b'{"step": 3}\n', b""):
        path.write_bytes(b'{"step": 1}\n' + line + b"\n" + last)
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"metrics.jsonl: line 2: {message}") as error:
            read_rows(path)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="line 2"):
            MetricsWriter(tmp_path, resume_step=1)
        assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [b"", b'{"step": 2', b"\0" * 100, b'{"step": \xff'])
def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path, cut):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + cut)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_metrics_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: Is a directory"):
        read_rows(tmp_path / "metrics.jsonl")


def test_pace_is_the_median_speed_and_the_time_of_all_sessions():
    rows = [{"tokens": 10, "tokens_per_second": 1.0}, {"step": 3, "eval": {}}]
    rows += [{"tokens": 30, "tokens_per_second": 10.0}, {"tokens": 50, "tokens_per_second": 10.0}]
    assert pace(rows) == (10.0, 14.0)
    assert pace([]) == (None, 0)
