"""The tokenizer of a run for other readers, who shall make the same ids and stop at the same ends.

`tokenizer.json` has the vocabulary, the special tokens and, where the model was taught with bos, a
post-processor that puts it before a text. `tokenizer_config.json` names class and special tokens.
`config.json` and `generation_config.json` have the ids that begin and end a text, and the latter
the rows of the embedding that are no tokens, which no reader may generate. What was imported from a
Hugging Face folder goes back as it came (see `_copy`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_jax.data import chat, tokenizer_folder
from lightning_jax.data.ends import BOS, EOS
from lightning_jax.data.files import optional_import
from lightning_jax.data.tokenizer_folder import GENERATION_CONFIG, VOCABULARIES
from lightning_jax.data.tokenizer_kinds import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from lightning_jax.data.tokenizer_stream import BYTE_OF_CHARACTER
from lightning_jax.runtime.files import StrPath, disk_errors, read_json, write_file, write_json

_TOKENIZER_JSON, _TOKENIZER_MODEL = VOCABULARIES
_TOKENIZER_CONFIG = "tokenizer_config.json"
# The class of `transformers` that does what a tokenizer.json says, and nothing else.
_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


def export_tokenizer(
    tokenizer: Tokenizer, workdir: StrPath, folder: str | Path, *, rows: int
) -> str:
    """Writes the files of a run's tokenizer into the Hugging Face folder of its model.

    Args:
      tokenizer: of the run.
      workdir: the run's folder.
      folder: a new one, with the model's `config.json`, which gets the ids.
      rows: of the model's embedding.

    Returns:
      What was written, or why other readers cannot use it, for the user.

    Raises:
      UserError: a file cannot be read or written, or the `tokenizers` library is missing.
    """
    folder, kept = Path(folder), Path(workdir) / "tokenizer"
    if isinstance(tokenizer, ByteTokenizer):
        said = f"{_TOKENIZER_JSON}: bytes as byte-level BPE without merges"
        _write_alone(folder, _byte_level_model(), tokenizer, BOS, EOS)
    elif kept.is_dir():
        said = f"{_copy(kept, folder, tokenizer)}, as it was imported"
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        said = _TOKENIZER_JSON
        model = type(tokenizer.model).from_str(tokenizer.model.to_str())
        names = (model.id_to_token(index) for index in (tokenizer.bos_id, tokenizer.eos_id))
        _write_alone(folder, model, tokenizer, *names)
    else:
        said = (
            f"{_TOKENIZER_MODEL}, as it was given; not exported for AutoTokenizer, which needs the "
            f"tokenizer_class of its model in {_TOKENIZER_CONFIG}"
        )
        content = (Path(workdir) / _TOKENIZER_MODEL).read_bytes()
        write_file(folder / _TOKENIZER_MODEL, content)
    _write_ids(folder, tokenizer, rows)
    return said


def _byte_level_model() -> Any:
    tokenizers = optional_import("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=BYTE_OF_CHARACTER, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([BOS, EOS])
    return model


def _write_alone(folder: Path, model: Any, tokenizer: Tokenizer, bos: str, eos: str) -> None:
    """Writes a vocabulary that has no folder of its own."""
    model.add_special_tokens([bos, eos])
    described = json.loads(model.to_str())
    described["post_processor"] = _begins_with(bos, tokenizer.bos_id)
    specials = {
        str(index): _added_token(token)
        for index, token in sorted(model.get_added_tokens_decoder().items())
        if token.special
    }
    write_json(folder / _TOKENIZER_JSON, described)
    config = {
        **_CLASS,
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": specials,
    }
    if {entry["content"] for entry in specials.values()} == {bos, eos}:
        # As here, no text spells a special token. Where there are others, chats may need to.
        config["split_special_tokens"] = True
    write_json(folder / _TOKENIZER_CONFIG, config)


def _begins_with(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts a token before each of one or two texts."""
    first, second = (
        [
            {"SpecialToken": {"id": token, "type_id": number}},
            {"Sequence": {"id": name, "type_id": number}},
        ]
        for number, name in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _added_token(token: Any) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in flags}


def _copy(kept: Path, folder: Path, tokenizer: Tokenizer) -> str:
    """Copies a tokenizer that was imported; returns the name of its vocabulary.

    Nothing changes, but tokens that begin or end a text are marked as special ones, and named where
    no config of the folder names any.
    """
    for name, content in tokenizer_folder.files(kept).items():
        with disk_errors(f"cannot write {folder / name}"):
            (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, content)
    vocabulary = tokenizer_folder.vocabulary_file(kept).name
    config = read_json(folder / _TOKENIZER_CONFIG, missing_ok=True)
    ends = {tokenizer.bos_id, *tokenizer.stop_ids}
    entries = config.get("added_tokens_decoder") or {}
    changed = _mark(entry for index, entry in entries.items() if int(index) in ends)
    spelled = {index: text for text, index in tokenizer.specials.items()}
    named = {*config, *chat.token_spellings(folder)}
    for key, index in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        is_used = key == "eos_token" or tokenizer.adds_bos
        if key not in named and is_used and index in spelled:
            config[key], changed = spelled[index], True
    if vocabulary == _TOKENIZER_JSON:
        described = read_json(folder / _TOKENIZER_JSON)
        if _mark(entry for entry in described["added_tokens"] if entry["id"] in ends):
            write_json(folder / _TOKENIZER_JSON, described)
        if "tokenizer_class" not in config:
            # Else the class follows from the model's family, which may be another one now.
            config, changed = {**_CLASS, **config}, True
    if changed:
        write_json(folder / _TOKENIZER_CONFIG, config)
    return vocabulary


def _mark(entries: Iterable[dict[str, Any]]) -> bool:
    """Marks tokens as special ones; returns whether any was not."""
    ordinary = [entry for entry in entries if not entry.get("special")]
    for entry in ordinary:
        entry["special"] = True
    return bool(ordinary)


def _write_ids(folder: Path, tokenizer: Tokenizer, rows: int) -> None:
    stop_ids = [*tokenizer.stop_ids]
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0],
    }
    write_json(folder / "config.json", read_json(folder / "config.json") | ids)
    more = {
        "stop_strings": [*tokenizer.stop_strings],
        "suppress_tokens": [*range(tokenizer.vocab_size, rows)],
    }
    ids |= {name: values for name, values in more.items() if values}
    write_json(folder / GENERATION_CONFIG, ids)
