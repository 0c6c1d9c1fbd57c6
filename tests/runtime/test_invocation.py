import shlex

from lightning_jax.runtime.invocation import command


def test_a_command_is_one_that_a_shell_takes_apart_again():
    line = command("train", "--workdir=runs/a b", "--config.sample_prompt=it's")
    assert shlex.split(line)[2:] == [
        "experiments.train",
        "--workdir=runs/a b",
        "--config.sample_prompt=it's",
    ]
