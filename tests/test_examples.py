"""The programs as a user calls them: answers on stdout, one line and status 2 for bad input."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_corpus

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
from configs import base
from tests.tiny import tiny_config

def get_config():
    config = tiny_config()
    config.data.sources = base.named(text=base.source({corpus!r}))
    shape = dict(mixture=base.named(text=1.0), batch_size=4, seq_len=32)
    config.stages = base.named(only=base.stage(tokens=640, learning_rate=1e-2, **shape))
    return config
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    corpus = write_corpus(folder)
    (folder / "config.py").write_text(CONFIG.format(corpus=corpus))
    return folder


def call(home, program, *flags, shell='"$@"'):
    """Runs a program, as `"$@"` in a line of a shell."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", f"experiments.{program}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def one_line(result, *parts):
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in lines[-1], lines[-1]


@pytest.fixture(scope="module")
def trained(home):
    flags = (f"--config={home}/config.py", f"--workdir={home}/run")
    result = call(home, "train", *flags)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["text"]["bits_per_byte"] > 0
    (home / "stderr").write_text(result.stderr)
    return home / "run"


@pytest.mark.slow
def test_train_evaluate_generate(home, trained):
    evaluated = call(home, "evaluate", f"--workdir={trained}", "--eval.top_p=0.2")
    assert evaluated.returncode == 0, evaluated.stderr
    answer = json.loads(evaluated.stdout)
    assert answer["routing"]["top_p"] == pytest.approx(0.2)
    assert answer["domains"]["text"]["experts_per_token"] >= 1

    flags = (f"--workdir={trained}", "--prompt=def ", "--max_new_tokens=8", "--seed=1")
    once, twice = call(home, "generate", *flags), call(home, "generate", *flags)
    assert once.returncode == 0, once.stderr
    assert once.stdout == twice.stdout
    # Case F6: nothing but the measurements.
    assert len(once.stderr.splitlines()) == 1 and "tokens/s" in once.stderr

    one_line(call(home, "evaluate", f"--workdir={trained}", "--step=3"), "step 3", "5")
    one_line(call(home, "evaluate", f"--workdir={trained}", "--data=/nowhere/*.txt"), "/nowhere")
    one_line(call(home, "generate", f"--workdir={home}/none", "--prompt=x"), "no checkpoint")
    other = (f"--config={home}/config.py", f"--workdir={trained}", "--config.model.model_dim=64")
    one_line(call(home, "train", *other), "model.model_dim = 64", "32")


@pytest.mark.slow
def test_the_quickstart_ends_with_sample_tables_and_card_and_a_run_gets_another(home):
    folder = home / "quick"
    flags = (f"--config={home}/config.py", f"--workdir={folder}", "--config.sample_tokens=8")
    result = call(home, "quickstart", *flags)
    assert result.returncode == 0, result.stderr
    assert "A sample, from 'def ':\n\ndef " in result.stdout
    bits = json.loads((folder / "evaluation.json").read_text())["text"]["bits_per_byte"]
    assert f"Held-out text: {bits:.3f} bits per byte" in result.stdout
    assert f"The card of this run: {folder}/card.html" in result.stdout
    assert "gzip -9" in result.stderr and "predecessor shape" in result.stderr
    assert (folder / "card.html").read_text().startswith("<!doctype html>")

    (folder / "card.html").unlink()
    result = call(home, "report", f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["held_out"]["text"]["this model"] == bits and answer["tokens"] == 640
    assert Path(answer["card"]).read_text().startswith("<!doctype html>")


# Case F7
@pytest.mark.slow
def test_the_first_and_last_lines_of_a_training_lead_on(home, trained):
    lines = (home / "stderr").read_text().splitlines()
    assert any(line.endswith(": a new run of 5 steps, 640 tokens") for line in lines)
    shown = [line for line in lines if line.startswith(("step ", "held out"))]
    assert [line.split()[0] for line in shown] == ["step", "step", "held"]
    for start in ("next", "or"):
        [command] = [line.split(maxsplit=1)[1] for line in lines if line.startswith(start + " ")]
        _, _, program, *flags = shlex.split(command)
        result = call(home, program.removeprefix("experiments."), *flags)
        assert result.returncode == 0 and result.stdout, result.stderr


# Case F1
@pytest.mark.slow
def test_a_training_whose_output_nobody_reads_comes_to_its_end(home, tmp_path):
    flags = (f"--config={home}/config.py", f"--workdir={tmp_path}/run")
    call(home, "train", *flags, shell=f'"$@" 2>&1 >{tmp_path}/answer | head -n 1')
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert json.loads((tmp_path / "answer").read_text()) == results
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    said = [row["output_lost"] for row in rows if "output_lost" in row]
    assert said == ["standard error: Broken pipe"]

    flags = (f"--config={home}/config.py", f"--workdir={tmp_path}/silent")
    result = call(home, "train", *flags, shell='"$@" >&-')
    one_line(result, "standard output")
    assert (tmp_path / "silent" / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.model.atention.window=3"], ["atention"]),
        (["--config.model.attention.window=0"], ["model.attention.window = 0", "at least 1"]),
        (["--config.model.attention.window=abc"], ["model.attention.window"]),
        (["--config.model.unit=Lg"], ["model.unit = 'Lg'", "owner"]),
        (["--config.mesh.tensor=2"], ["mesh = ", "'tensor': 2", "1 devices"]),
        (
            ["--config.data.sources.text.path=/nowhere/*.txt"],
            ["data.sources.text.path", "/nowhere"],
        ),
        (["--config.data.tokenizer=bytez"], ["data.tokenizer = 'bytez'"]),
    ],
)
def test_bad_config_is_one_line(home, tmp_path, flags, parts):
    flags = [f"--config={home}/config.py", f"--workdir={tmp_path}", *flags]
    one_line(call(home, "train", *flags), *parts)


@pytest.mark.slow
def test_bad_data_is_one_line_that_names_file_and_line(home, tmp_path):
    for name, text, parts in (
        ("corrupt", '{"text": "a b c"}\n{"text": \n', ["corrupt.jsonl", "2"]),
        ("empty", "", ["data.sources.text.path"]),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        override = f"--config.data.sources.text.path={path}"
        flags = [f"--config={home}/config.py", f"--workdir={tmp_path}/{name}", override]
        one_line(call(home, "train", *flags), *parts)
