from lightning_jax.config.errors import did_you_mean, some_of, suggest


def test_a_close_name_is_suggested_and_a_far_one_is_not():
    assert did_you_mean("top_q", ["dense", "top_p"]) == ' (did you mean "top_p"?)'
    assert did_you_mean("zzz", ["dense", "top_p"]) == ""
    assert suggest("top_q", ("dense", "top_p")) == 'one of dense, top_p (did you mean "top_p"?)'


def test_any_value_and_any_options_will_do():
    assert suggest(None, (name for name in ("a", "b"))) == "one of a, b"


def test_long_lists_of_names_are_cut():
    assert some_of(["a", "b", "c"]) == "a, b, c" and some_of([]) == ""
    assert some_of(list("abcdef"), 4) == "a, b, c, d and 2 more"
