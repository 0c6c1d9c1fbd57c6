"""The settings of a tokenizer in a Hugging Face folder, besides the vocabulary."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_jax.config.errors import UserError
from lightning_jax.config.kinds import (
    FLAG,
    OBJECT,
    TEXT,
    Kind,
    check,
    either,
    integer,
    list_of,
    map_of,
    or_null,
    shorten,
)
from lightning_jax.data import chat
from lightning_jax.data.chat import ChatTemplate
from lightning_jax.runtime.files import disk_errors, read_json
from lightning_jax.runtime.folders import new_folder

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
GENERATION_CONFIG = "generation_config.json"
_MODEL_CONFIGS = (GENERATION_CONFIG, "config.json")
_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    chat.TEMPLATE_FILE,
    chat.TEMPLATE_JSON,
)

_IDS = {
    "bos_token_id": or_null(integer(0)),
    "eos_token_id": or_null(either(integer(0), list_of(integer(0)))),
    "stop_strings": or_null(either(TEXT, list_of(TEXT))),
    "_from_model_config": or_null(FLAG),
}
_CONFIG = {
    "add_bos_token": or_null(FLAG),
    "legacy": or_null(FLAG),
    "added_tokens_decoder": or_null(map_of(OBJECT)),
    "additional_special_tokens": or_null(list_of(chat.TOKEN)),
}
_ADDED = {"content": chat.SPELLING, "special": or_null(FLAG)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a tokenizer; the defaults are those of a vocabulary file without a folder.

    `bos_token` and `eos_token` are spellings; `bos_id` and `eos_ids` come from the configs of the
    model, if these name them, and `named_ids` are all of them with file and key. `eos_ids_are_sure`
    is False if they may be no more than the defaults of a config class. `adds_bos` is None if no
    config tells. `added` maps the spelling of tokens beyond the vocabulary file to their id and
    whether they are special. `prefix_each` is True if text after a special token is tokenized as if
    it began a text (`legacy`). What follows from them is decided in `ends`.
    """

    alone: bool = True
    bos_token: str | None = None
    eos_token: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    eos_ids_are_sure: bool = False
    named_ids: tuple[tuple[str, int], ...] = ()
    stop_strings: tuple[str, ...] = ()
    adds_bos: bool | None = None
    added: Mapping[str, tuple[int, bool]] = dataclasses.field(default_factory=dict)
    prefix_each: bool = False
    chat_template: ChatTemplate | None = None

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Reads the configs of a folder; none of them has to exist.

        Raises:
          UserError: one of them cannot be read, or has a value that it must not have.
        """
        config = _read(folder / "tokenizer_config.json", _CONFIG)
        spelled = chat.token_spellings(folder)
        models = {name: _read(folder / name, _IDS) for name in _MODEL_CONFIGS}
        bos_name, bos_ids = _first(models, "bos_token_id")
        eos_name, eos_ids = _first(models, "eos_token_id")
        generation = models[GENERATION_CONFIG]
        is_generation = eos_name == GENERATION_CONFIG
        return cls(
            alone=False,
            bos_token=spelled.get("bos_token"),
            eos_token=spelled.get("eos_token"),
            bos_id=next(iter(bos_ids), None),
            eos_ids=eos_ids,
            eos_ids_are_sure=is_generation and generation.get("_from_model_config") is not True,
            named_ids=(
                *((f"{folder / bos_name}: bos_token_id", index) for index in bos_ids),
                *((f"{folder / eos_name}: eos_token_id", index) for index in eos_ids),
            ),
            stop_strings=tuple(filter(None, _listed(generation.get("stop_strings")))),
            adds_bos=config.get("add_bos_token"),
            added=_added(folder, config, spelled),
            prefix_each=config.get("legacy") is True,
            chat_template=ChatTemplate.load(folder),
        )


def _read(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    values = read_json(path, missing_ok=True)
    check(values, kinds, path, required=())
    return values


def _listed(value: Any) -> tuple[Any, ...]:
    """One value, several or null as a tuple."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _first(models: Mapping[str, Mapping[str, Any]], key: str) -> tuple[str, tuple[int, ...]]:
    """The first config that has ids under `key`, and these."""
    found = ((name, _listed(model.get(key))) for name, model in models.items())
    return next(((name, ids) for name, ids in found if ids), ("", ()))


def _added(
    folder: Path, config: Mapping[str, Any], spelled: Mapping[str, str]
) -> dict[str, tuple[int, bool]]:
    """From `added_tokens_decoder`, else `added_tokens.json`: the tokens that configs name."""
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        added = {}
        for key, entry in decoder.items():
            where = f"{path}: added_tokens_decoder[{shorten(key)}]"
            check(entry, _ADDED, where, required=("content",))
            # As long as the largest id at the most, so that no digits are too many to read.
            index = int(key) if re.fullmatch("[0-9]{1,10}", key) else -1
            if not integer(0).accepts(index):
                raise UserError(f"{where}: its key must be the id, {integer(0).right}")
            added[entry["content"]] = (index, bool(entry.get("special")))
        return added
    path = folder / "added_tokens.json"
    legacy = read_json(path, missing_ok=True)
    check(legacy, dict.fromkeys(legacy, integer(0)), path, required=())
    for content in legacy:
        if not chat.SPELLING.accepts(content):
            raise UserError(f"{path}: {shorten(content)}: must be {chat.SPELLING.right}")
    extra = map(chat.spelling, config.get("additional_special_tokens") or ())
    special = {*spelled.values(), *extra}
    return {content: (index, content in special) for content, index in legacy.items()}


def vocabulary_file(folder: Path) -> Path:
    """Returns the vocabulary of a folder, `tokenizer.json` before `tokenizer.model`.

    Raises:
      UserError: it has neither.
    """
    for name in VOCABULARIES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"data.tokenizer = {str(folder)!r}: has no {' and no '.join(VOCABULARIES)}")


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder that make its tokenizer, by relative name."""
    templates = sorted((folder / chat.TEMPLATE_FOLDER).glob("*.jinja"))
    paths = [*(folder / name for name in _FILES), *templates]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()
    }


def copy(source: Path, target: Path) -> None:
    """Copies the tokenizer of one folder to a new one, which appears whole or not at all.

    Of the model's configs only what begins and ends a text is copied, into a
    `generation_config.json`: the new folder describes no model, and may be laid over the folder of
    another model.
    """
    settings, contents = Settings.load(source), files(source)
    ids = {
        "bos_token_id": settings.bos_id,
        "eos_token_id": [*settings.eos_ids] or None,
        "stop_strings": [*settings.stop_strings] or None,
        "_from_model_config": True if settings.eos_ids and not settings.eos_ids_are_sure else None,
    }
    ids = {name: value for name, value in ids.items() if value is not None}
    if ids:
        contents[GENERATION_CONFIG] = (json.dumps(ids, indent=2) + "\n").encode("utf-8")
    with new_folder(target, "data.tokenizer") as folder, disk_errors(f"cannot write {target}"):
        for name, content in contents.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
