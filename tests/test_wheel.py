"""A wheel, in an environment of its own and far from any checkout, trains and generates."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a build reads.
SOURCES = ("lightning_jax", "configs", "experiments", "setup.py", "pyproject.toml", "MANIFEST.in")
SOURCES += ("README.md", "LICENSE", "constraints.txt")

CONFIG = """
from configs import base, tour

def get_config():
    config = tour.get_config()
    config.stages = base.named(only=base.stage(batch_size=7))
    return config
"""
TINY = [
    "--config=tour",
    "--workdir=runs/a",
    "--config.model.unit=G",
    "--config.model.model_dim=16",
    "--config.stages.stable.tokens=1024",
    "--config.stages.stable.warmup_tokens=0",
    "--config.stages.decay.tokens=1024",
    "--config.stages.decay.decay_tokens=1024",
    "--config.eval_tokens=64",
    "--config.final_eval_tokens=64",
]


def run(*command, cwd, **changes):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": "", **changes}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def bin(tmp_path_factory):
    """Folder of tools of a new environment with the wheel; the rest is that of the tests."""
    home = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, home / name)
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    built = run(*build, "-w", home / "dist", home, cwd=home)
    assert built.returncode == 0, built.stderr
    [wheel] = (home / "dist").glob("*.whl")
    made = run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    assert made.returncode == 0, made.stderr
    [packages] = (home / "venv").glob("lib/python*/site-packages")
    # Python does not read the .pth files in a folder that one adds: the checkout stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "venv" / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=home)
    assert installed.returncode == 0, installed.stderr
    return python.parent


@pytest.fixture
def elsewhere(tmp_path, bin):
    return lambda *command: run(bin / command[0], *command[1:], cwd=tmp_path)


@pytest.mark.slow
def test_what_is_in_the_wheel(elsewhere, bin):
    program = (
        "import importlib.util, sys, lightning_jax.config\n"
        "print(lightning_jax.__file__, importlib.util.find_spec('configs'))\n"
        "assert 'jax' not in sys.modules"
    )
    file, configs = elsewhere("python", "-c", program).stdout.split()
    assert Path(file).is_relative_to(bin.parent) and configs == "None"
    package = Path(file).parent
    assert (package / "py.typed").exists()
    assert not list((package / "shipped").rglob("benchmark*"))
    ours = sorted(path.name for path in (ROOT / "configs").rglob("*.py"))
    assert sorted(path.name for path in (package / "shipped" / "configs").rglob("*.py")) == ours


@pytest.mark.slow
def test_it_lists_its_programs_and_refuses_in_a_line(elsewhere, tmp_path):
    done = elsewhere("lightning-jax", "--help")
    assert done.returncode == 0 and "\n  train  " in done.stdout
    assert "\n  benchmark" not in done.stdout
    assert elsewhere("lightning-jax", "--version").stdout.startswith("lightning_jax 0.")
    help = elsewhere("lightning-jax", "train", "--help").stdout
    assert "    lightning-jax train --config=configs/small.py" in help
    (tmp_path / "own.py").write_text(CONFIG)
    for command, line in (
        (["benchmark", "--suite=data"], "benchmark needs a checkout of the project"),
        (["train", "--config=smal", "--workdir=a"], '(did you mean "small"?)'),
        (["sweep", "--sweep=pattern", "--workdir=a", "--only=x"], "only = 'x': must be one of G"),
        # The user's own file, which imports the configs of the wheel.
        (["train", "--config=own.py", "--workdir=a", "--config.data.streams=2"], "only.batch_size"),
    ):
        done = elsewhere("lightning-jax", *command)
        assert done.returncode == 2 and line in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_it_trains_and_generates(elsewhere, tmp_path):
    trained = elsewhere("lightning-jax", "train", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "lightning-jax generate --workdir=" in trained.stderr
    record = (tmp_path / "runs" / "a" / "run.json").read_text()
    assert '"--config=tour"' in record and '"lightning_jax": "0.' in record
    flags = ("--workdir=runs/a", "--prompt=def ", "--max_new_tokens=4")
    sample = elsewhere("lightning-jax", "generate", *flags)
    assert sample.returncode == 0 and sample.stdout.startswith("def "), sample.stderr
