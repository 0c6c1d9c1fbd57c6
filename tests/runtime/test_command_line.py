"""Values of flags that name several things. tests/test_command_lines.py has whole command lines."""

import types

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import command_line


def flag(value):
    return types.SimpleNamespace(name="only", value=value)


def test_a_flag_that_is_left_out_names_nothing():
    assert command_line.names(flag(None)) == command_line.numbers(flag(None)) == ()
    assert command_line.names(flag(["b", "a"])) == ("b", "a")
    assert command_line.numbers(flag(["1", "0", "1"])) == (1, 0, 1)


# Case F5
@pytest.mark.parametrize("value", [[], [""], ["a", ""], ["a", "b", "a"]])
def test_names_that_are_empty_or_twice_are_refused(value):
    with pytest.raises(UserError, match=f"^--only={','.join(value)}: a name is "):
        command_line.names(flag(value))


# Case F5
@pytest.mark.parametrize("value", [[], [""], ["1", ""], ["-1"], ["1.0"], ["x"], ["²"], ["9" * 10]])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(UserError, match="^only = .*: must be numbers like 0,1"):
        command_line.numbers(flag(value))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("a field\nof two lines"), "a field of two lines"),
        (ValueError(), "ValueError"),
        ("a  text", "a text"),
    ],
)
def test_one_line(error, line):
    assert command_line.one_line(error) == line
