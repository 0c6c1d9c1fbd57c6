"""Folders with tokenizers as they come from Hugging Face, small and made here."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

TEXTS = ["def f(x): return x + 1\n" * 5, "the cat sat on a mat, the rat ran", "café 漢字 漢字"]

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

INST = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] | trim + eos_token }}
{% else %}
{{ raise_exception('Conversation roles must be user and assistant') }}
{% endif %}
{% endfor %}"""


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def special(content: str) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": True, **flags}


def byte_level(folder: Path, specials: list[str], *, bos: str | None = None) -> dict[str, int]:
    """Writes a byte-level BPE `tokenizer.json`, as of Qwen or Llama 3; returns ids of specials."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, show_progress=False
        ),
    )
    model.add_special_tokens(specials)
    ids = {name: model.token_to_id(name) for name in specials}
    if bos:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
        )
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return ids


def qwen(folder: Path) -> dict[str, int]:
    """No bos in the tokenizer, answers end with `<|im_end|>`, template in the config."""
    ids = byte_level(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {str(ids[name]): special(name) for name in ids},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    end = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    write_json(folder / "generation_config.json", {"eos_token_id": end})
    write_json(folder / "config.json", {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": 7})
    return ids


def llama3(folder: Path) -> dict[str, int]:
    """The post-processor adds bos; specials are objects in a map; the template is a file."""
    ids = byte_level(folder, ["<|begin|>", "<|eot|>", "<|stop|>"], bos="<|begin|>")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"bos_token": special("<|begin|>"), "eos_token": special("<|eot|>")}
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "config.json", {"eos_token_id": [ids["<|eot|>"], ids["<|stop|>"]]})
    (folder / "chat_template.jinja").write_text(INST)
    return ids


def sentencepiece(folder: Path, **config: object) -> None:
    """A BPE `tokenizer.model` with bytes, as of Llama 2, Mistral 7B and Yi, with an added token."""
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "[INST] the cat [/INST] sat"] * 10),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = library.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    names = ["<unk>", "<s>", "</s>"]
    decoder = {str(index): special(name) for index, name in enumerate(names)}
    decoder[str(size)] = special("<|turn|>")
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "added_tokens_decoder": decoder,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": [
                {"name": "default", "template": INST},
                {"name": "turns", "template": "{{ messages | length }}<|turn|>"},
            ],
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            **config,
        },
    )


KINDS = {
    "qwen": qwen,
    "llama3": llama3,
    "sentencepiece": sentencepiece,
    "legacy": lambda folder: sentencepiece(folder, legacy=True),
}


def write_all(home: Path) -> Path:
    """Writes a folder of each kind, named after it; returns `home`."""
    for name, write in KINDS.items():
        write(home / name)
    return home
