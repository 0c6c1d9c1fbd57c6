import math

import pytest

from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError

UGLY = [None, True, 0, 1, -1, 2**31, 10**400, 0.5, math.nan, math.inf, "1", "", [], [1], {}, b""]


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        (kinds.integer(0), [0, 1]),
        (kinds.integer(1), [1]),
        (kinds.integer(0, 2**31), [0, 1, 2**31]),
        (kinds.number(), [0, 1, -1, 2**31, 0.5]),
        (kinds.number(0, 1, above=True), [1, 0.5]),
        (kinds.TEXT, ["1", ""]),
        (kinds.FLAG, [True]),
        (kinds.OBJECT, [{}]),
        (kinds.choice(["1", "2"]), ["1"]),
        (kinds.list_of(kinds.integer(0)), [[], [1]]),
        (kinds.map_of(kinds.TEXT), [{}]),
        (kinds.either(kinds.FLAG, kinds.TEXT), [True, "1", ""]),
        (kinds.or_null(kinds.FLAG), [None, True]),
    ],
    ids=lambda value: getattr(value, "right", None),
)
def test_a_kind_accepts_its_values_and_no_others(kind, accepted):
    assert [value for value in UGLY if kind.accepts(value)] == accepted


def test_a_table_names_the_key_its_value_and_what_would_be_right():
    table = {"layers": kinds.integer(1), "eps": kinds.number(0, above=True)}
    kinds.check({"layers": 2, "eps": 1e-5, "other": None}, table, "a.json", required=["layers"])
    for values, message in [
        ({"layers": "2"}, r"a.json: layers = '2': must be a whole number in \[1, 2147483647\]"),
        ({"layers": 2, "eps": None}, r"eps = None: must be a finite number in \(0, inf\]"),
        ({"layer": 2}, r'a.json: lacks layers; it has one of layer \(did you mean "layer"'),
        ({}, "a.json: lacks layers; it is empty"),
        ({"layers": "x" * 1000}, r"layers = 'x{76}\.\.\.: must"),
    ]:
        with pytest.raises(UserError, match=message):
            kinds.check(values, table, "a.json", required=["layers"])
