"""Templates of others end, whatever they do."""

from __future__ import annotations

import os
import threading
import time

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data import templates

pytest.importorskip("jinja2")

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": LOOP,
    "loops in a comparison": "{{ (range(99999) | map('string') | join) is eq 1 }}" + LOOP,
    "a power": "{{ 10 ** (10 ** 8) }}",
    "a long string": "{{ 'a' * 10 ** 9 }}",
    "a long string of several": "{% for a in range(999) %}{{ 'a' * 10 ** 6 }}{% endfor %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x | length }}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macros that branch": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(90) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a width": "{{ '{:>9999999999}'.format(1) }}",
    "an indent": "{{ 'a\n' * 9999 | indent(10 ** 7) }}",
    "joins": "{{ range(99999) | join('b' * 10 ** 5) }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 7) }}",
    "brackets": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
}


def rest(messages=("hi",)):
    return templates.render("{{ messages[0] }}", {"messages": [*messages]})


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line_in_bounded_time(name, monkeypatch):
    rest()
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(UserError, match="^chat template.*: .") as caught:
        templates.render(BOMBS[name], {})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    # Starting the process again counts, on a machine with other work.
    assert rest() == "hi" and time.monotonic() - began < 20


def test_what_limits_a_template(monkeypatch):
    with pytest.raises(UserError, match="makes more than 16777216 characters"):
        templates.render("{% for i in range(99) %}{{ 'a' * 10 ** 6 }}{% endfor %}", {})
    with pytest.raises(UserError, match="MemoryError"):
        templates.render("{{ ('a' * 10 ** 10) | length }}", {})
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(UserError, match=r"takes more than 0\.2 seconds$"):
        templates.render(LOOP, {})


def test_long_chats_are_within_the_limits():
    text = "\u6f22 <|x|>\n" * 10**5
    assert rest([text]) == text


def test_messages_must_be_json():
    with pytest.raises(UserError, match="messages must be JSON values"):
        rest([object()])


def test_threads_share_the_process_and_an_interrupt_leaves_no_answer_behind(monkeypatch):
    found = []
    threads = [
        threading.Thread(target=lambda name=name: found.append((name, rest([name]))))
        for name in "abcdefgh"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(name, name) for name in "abcdefgh"]

    class Interrupted:
        def __init__(self, process):
            self.process = process

        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(templates._worker._process, "stdout", Interrupted(None))
    with pytest.raises(KeyboardInterrupt):
        rest(["lost"])
    assert rest(["next"]) == "next"


def test_a_process_that_was_killed_is_replaced():
    rest()
    process = templates._worker._process
    os.kill(process.pid, 9)
    process.wait()
    assert rest() == "hi"


def test_a_forked_process_has_its_own(monkeypatch):
    assert rest() == "hi"
    parents = templates._worker._process
    with monkeypatch.context() as forked:
        forked.setattr(templates._worker, "_owner", 1)
        assert rest(["child"]) == "child"
        assert templates._worker._process is not parents and parents.poll() is None
    parents.kill()
    parents.wait()
    parents.stdin.close()
    parents.stdout.close()
    assert rest() == "hi"
