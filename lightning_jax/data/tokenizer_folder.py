"""The settings of a tokenizer in a Hugging Face folder, besides the vocabulary."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_jax.config.errors import UserError
from lightning_jax.data import chat
from lightning_jax.data.chat import ChatTemplate
from lightning_jax.runtime.files import read_json

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_MODEL_CONFIGS = ("generation_config.json", "config.json")
_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    chat.TEMPLATE_FILE,
    chat.TEMPLATE_JSON,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a tokenizer; the defaults are those of a vocabulary file without a folder.

    `bos_token` and `eos_token` are spellings; `bos_id` and `eos_ids` come from the configs of the
    model, if these name them. `adds_bos` is None if no config tells. `added` maps the spelling of
    tokens beyond the vocabulary file to their id and whether they are special. `prefix_each` is
    True if text after a special token is tokenized as if it began a text (`legacy`).
    """

    alone: bool = True
    bos_token: str | None = None
    eos_token: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    adds_bos: bool | None = None
    added: Mapping[str, tuple[int, bool]] = dataclasses.field(default_factory=dict)
    prefix_each: bool = False
    chat_template: ChatTemplate | None = None

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Reads the configs of a folder; none of them has to exist.

        Raises:
          UserError: one of them cannot be read.
        """
        config = read_json(folder / "tokenizer_config.json", missing_ok=True)
        spelled = chat.token_spellings(folder)
        models = [read_json(folder / name, missing_ok=True) for name in _MODEL_CONFIGS]
        adds_bos = config.get("add_bos_token")
        return cls(
            alone=False,
            bos_token=spelled.get("bos_token"),
            eos_token=spelled.get("eos_token"),
            bos_id=next(iter(_ids(models, "bos_token_id")), None),
            eos_ids=_ids(models, "eos_token_id"),
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            added=_added(config, read_json(folder / "added_tokens.json", missing_ok=True), spelled),
            prefix_each=config.get("legacy") is True,
            chat_template=ChatTemplate.load(folder),
        )


def _ids(models: list[dict[str, Any]], key: str) -> tuple[int, ...]:
    """An id, or a list of them, from the first config that has one."""
    for model in models:
        value = model.get(key)
        ids = value if isinstance(value, list) else [value]
        if value is not None and ids and all(type(i) is int for i in ids):
            return tuple(ids)
    return ()


def _added(
    config: Mapping[str, Any], legacy: Mapping[str, Any], spelled: Mapping[str, str]
) -> dict[str, tuple[int, bool]]:
    """From `added_tokens_decoder`, else `added_tokens.json`: the tokens that configs name."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {
            entry["content"]: (int(index), bool(entry.get("special")))
            for index, entry in decoder.items()
        }
    special = {*spelled.values(), *(config.get("additional_special_tokens") or ())}
    return {content: (int(index), content in special) for content, index in legacy.items()}


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

    Of the model's configs only the ids are copied, into a `generation_config.json`: the new folder
    describes no model, and may be laid over the folder of another model.
    """
    settings, contents = Settings.load(source), files(source)
    ids = {"bos_token_id": settings.bos_id, "eos_token_id": [*settings.eos_ids] or None}
    ids = {name: value for name, value in ids.items() if value is not None}
    if ids:
        contents[_MODEL_CONFIGS[0]] = (json.dumps(ids, indent=2) + "\n").encode("utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for name, content in contents.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        temporary.chmod(0o755)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
