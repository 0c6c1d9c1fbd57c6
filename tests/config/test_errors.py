from lightning_jax.config.errors import did_you_mean, suggest


def test_a_close_name_is_suggested_and_a_far_one_is_not():
    assert did_you_mean("top_q", ["dense", "top_p"]) == ' (did you mean "top_p"?)'
    assert did_you_mean("zzz", ["dense", "top_p"]) == ""
    assert suggest("top_q", ("dense", "top_p")) == 'one of dense, top_p (did you mean "top_p"?)'


def test_any_value_and_any_options_will_do():
    assert suggest(None, (name for name in ("a", "b"))) == "one of a, b"
