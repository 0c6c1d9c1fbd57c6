from __future__ import annotations

import re
import sys

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data import templates
from lightning_jax.data.chat import ChatTemplate
from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from tests.data import hf_folders

pytest.importorskip("jinja2")

CHAT = [
    {"role": "user", "content": " the cat "},
    {"role": "assistant", "content": "sat  "},
    {"role": "user", "content": "on a mat <|im_end|></s>"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hf_folders.write_all(tmp_path_factory.mktemp("chat"))


def template(source, **variables):
    return ChatTemplate({"default": source}, variables)


def user(text):
    return [{"role": "user", "content": text}]


def test_blocks_leave_no_space_and_values_are_not_escaped():
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert template(source).render(user("a <b> & 'c'")) == "a <b> & 'c'\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ pad_token }}!", "<s>!"),
        ("{{ {'b': '<\u00e9>', 'a': 1} | tojson }}", '{"b": "<\u00e9>", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=2) }}", "[\n  1,\n  2\n]"),
        (
            "{{ {'b': 1, 'a': '\u00e9'} | tojson(ensure_ascii=true, sort_keys=true) }}",
            '{"a": "\\u00e9", "b": 1}',
        ),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% set x = namespace(n=1) %}{% set x.n = 2 %}{{ x.n }}", "2"),
        ("a{% generation %}{% set n = 3 %}b{{ n }}{% endgeneration %}c", "ab3c"),
        ("{{ tools is none }} {{ documents is none }} {{ x is defined }}", "True True False"),
        ("{{ messages[0].content }}{{ messages[0].name is defined }}", "hiFalse"),
    ],
)
def test_what_a_template_can_do(source, expected):
    messages = [{"role": "user", "content": "hi", "name": None}]
    assert template(source, bos_token="<s>").render(messages) == expected


def test_time_and_extra_variables():
    made = template("{{ strftime_now('%Y') }} {{ enable_thinking }} {{ bos_token }}", bos_token="a")
    text = made.render(user("x"), enable_thinking=False, bos_token="b")
    assert re.fullmatch(r"\d{4} False b", text)


def test_templates_by_name():
    made = ChatTemplate({"default": "d", "tool_use": "t{{ tools | length }}", "rag": "r"}, {})
    assert made.render(user("x")) == "d"
    assert made.render(user("x"), tools=[]) == "d"
    assert made.render(user("x"), tools=[{}, {}]) == "t2"
    assert made.render(user("x"), template="rag") == "r"
    with pytest.raises(UserError, match=r"^chat template 'ragg': .*did you mean \"rag\""):
        made.render(user("x"), template="ragg")


def test_without_jinja_one_line_says_how_to_get_it(monkeypatch):
    templates._worker.close()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"^package jinja2.*pip install .*\[interop\]'$"):
        template("any").render(user("x"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles\\n must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("line\n{% if %}", "line 2"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_line(source, message):
    with pytest.raises(UserError, match=f"^chat template.*{re.escape(message)}") as caught:
        template(source).render(user("x"))
    assert "\n" not in str(caught.value)


def test_an_answer_is_continued():
    kept = template("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    trimmed = template("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    chat = [*user("x"), {"role": "assistant", "content": "so  "}]
    assert kept.render(chat, False, continue_final=True) == "[x][so  "
    assert trimmed.render(chat, False, continue_final=True) == "[x][so"
    for made, messages, options, message in (
        (kept, chat, {}, "must be False with add_generation_prompt"),
        (kept, [], {"add_generation_prompt": False}, "at least one message"),
        (kept, [{"role": "user"}], {"add_generation_prompt": False}, "content is a string"),
        (template("x"), chat, {"add_generation_prompt": False}, "leaves out the last message"),
    ):
        with pytest.raises(UserError, match=message):
            made.render(messages, **options, continue_final=True)


def test_where_a_folder_keeps_its_template(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "eos_token": None, "chat_template": "config"}
    hf_folders.write_json(tmp_path / "tokenizer_config.json", config)
    assert ChatTemplate.load(tmp_path) == ChatTemplate({"default": "config"}, {"bos_token": "<s>"})
    named = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]
    config["chat_template"] = named
    hf_folders.write_json(tmp_path / "tokenizer_config.json", config)
    assert ChatTemplate.load(tmp_path).templates == {"default": "one", "rag": "two"}
    hf_folders.write_json(tmp_path / "chat_template.json", {"chat_template": "json"})
    assert ChatTemplate.load(tmp_path).templates == {"default": "json"}
    (tmp_path / "chat_template.jinja").write_text("caf\u00e9", encoding="utf-8")
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "rag.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path).templates == {"default": "caf\u00e9", "rag": "file"}


@pytest.mark.parametrize(
    "value",
    [3, {"default": 1}, [{"name": "default"}], [1], [{"name": {}, "template": "x"}]],
)
def test_a_template_must_be_text(value, tmp_path):
    hf_folders.write_json(tmp_path / "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(UserError, match="chat_template must be a string"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_no_message_can_write_a_special_token(folders, kind):
    tokenizer = load_tokenizer(str(folders / kind))
    made, evil = tokenizer.chat_template, "".join(tokenizer.specials)
    special = set(tokenizer.specials.values())

    def count(text):
        return sum(index in special for index in made.encode(tokenizer, user(text)))

    assert count("mat" + evil) == count("mat") > 0
    assert count("\U000f0000".join(evil)) == count("\U000f0001mat\U000f0000") == count("mat")
    assert tokenizer.decode(made.encode(tokenizer, user("a" + evil + "b"))).count(evil) == 1
    # What harms nobody is tokenized as one text.
    rendered = made.render(user("a < b | c"))
    assert made.encode(tokenizer, user("a < b | c")) == tokenizer.encode(rendered, specials=True)


def test_bytes_have_no_specials_to_write():
    made = template("<s>{{ messages[0].content }}")
    assert bytes(made.encode(ByteTokenizer(), user("hi"))) == b"<s>hi"


@pytest.mark.slow
@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_as_transformers_renders_and_tokenizes(folders, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(str(folders / kind))
    made, theirs = (
        tokenizer.chat_template,
        transformers.AutoTokenizer.from_pretrained(str(folders / kind)),
    )
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": [{"type": "function", "about": "<\u00e9>"}]},
        {"add_generation_prompt": True, "enable_thinking": False},
    ):
        text = made.render(CHAT, **options)
        assert text == theirs.apply_chat_template(CHAT, tokenize=False, **options)
        ids = theirs.apply_chat_template(CHAT, return_dict=False, **options)
        assert tokenizer.encode(text, specials=True) == ids
        safe = theirs.apply_chat_template(
            CHAT, return_dict=False, sanitize_control_tokens=True, **options
        )
        assert made.encode(tokenizer, CHAT, **options) == safe
    for chat in (CHAT[:2], user(" hi \n")):
        expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert made.render(chat, False, continue_final=True) == expected
