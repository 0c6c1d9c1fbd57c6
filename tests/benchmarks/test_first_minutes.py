"""The first minutes of a checkout whose quickstart is three lines of shell."""

import json
import subprocess

import pytest

from benchmarks import first_minutes
from lightning_jax.config.errors import UserError

MAKEFILE = """
quickstart:
\t@echo "[setup] done in 3 s" >&2; sleep 0.3
\t@echo "step 1/9  loss 8.3"; echo "step 2/9  loss 8.2"
\t@echo "A sample, from 'def ':"
\t@mkdir -p runs/quickstart "$$HOME/.cache" && echo x > "$$PIP_CACHE_DIR/wheel"
\t@test ! -e "$$HOME/old" -a -z "$$JAX_COMPILATION_CACHE_DIR" -a ! -e untracked
\t@echo '{"code": {"bits_per_byte": 1.5}}' > runs/quickstart/evaluation.json
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "Makefile").write_text(MAKEFILE)
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "Makefile"], ["commit", "-qm", "Add"]):
        subprocess.run([*git, *command], check=True)
    (root / "untracked").touch()
    monkeypatch.setattr(first_minutes, "_ROOT", root)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere")
    return root


def test_a_fresh_environment_is_timed_from_the_clone(checkout, tmp_path):
    packages = tmp_path / "packages"
    for folder, state in (("first", "empty"), ("second", "warm")):
        (tmp_path / folder).mkdir()
        *moments, run = first_minutes.measure(tmp_path / folder, packages)
        assert [row["name"] for row in moments] == [*first_minutes.MOMENTS, "end"]
        minutes = [row["minutes"] for row in moments]
        assert minutes == sorted(minutes) and minutes[0] > 0
        assert run["package_cache"] == state and run["code_bits_per_byte"] == 1.5
        assert run["longest_silence_s"] > 0.25 and run["before_silence"] == "[setup] done in 3 s"
        assert json.loads(json.dumps(run)) == run


def test_a_quickstart_that_fails_or_is_mute_is_a_line(checkout, tmp_path):
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@x"]
    for name, recipe, reason in (
        ("fails", "exit 3", "make quickstart: exit status 2"),
        ("mute", "true", "printed no line with '[setup] done'"),
    ):
        (checkout / "Makefile").write_text(f"quickstart:\n\t@{recipe}\n")
        subprocess.run([*git, "commit", "-qam", name], check=True)
        (tmp_path / name).mkdir()
        with pytest.raises(UserError) as error:
            first_minutes.measure(tmp_path / name, tmp_path / "packages")
        assert reason in str(error.value)


def test_settings_of_pip_are_kept_and_nothing_else_of_the_home(tmp_path, monkeypatch):
    settings = tmp_path / "config" / "pip" / "pip.conf"
    settings.parent.mkdir(parents=True)
    settings.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere")
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    found = first_minutes.environment(tmp_path / "home", tmp_path / "packages")
    assert found["PIP_CONFIG_FILE"] == str(settings) and "VIRTUAL_ENV" not in found
    assert found["HOME"] == str(tmp_path / "home")
    assert found["XDG_CONFIG_HOME"].startswith(found["HOME"])
