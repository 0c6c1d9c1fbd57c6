"""Chat templates: from a list of messages to the one text that a model was taught to answer.

A template is a Jinja program in a tokenizer's folder. It runs in Jinja's sandbox, within limits of
time and memory (`templates`), with the names that `transformers` provides: `raise_exception`,
`strftime_now`, `tojson`, loop controls, the `generation` block (whose marks are dropped) and the
spelling of every special token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.kinds import Kind, check, choice, either, or_null
from lightning_jax.data import templates
from lightning_jax.runtime.files import read_json

Message = Mapping[str, Any]

DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATE_FILE, TEMPLATE_JSON, TEMPLATE_FOLDER = (
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates",
)
# A token's spelling; in a config it may be an object with this `content` and how to match it.
SPELLING = Kind("a string of Unicode characters, at least one", lambda value: _is_spelling(value))
TOKEN = either(
    SPELLING,
    Kind(
        "an object with such a content",
        lambda value: type(value) is dict and _is_spelling(value.get("content")),
    ),
)
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_TOKENS = {f"{name}_token": or_null(either(TOKEN, choice([""]))) for name in _NAMED}
# Private characters around a special token spelled in a message, and where a message is cut.
_OPEN, _CLOSE, _CUT = "\U000f0000", "\U000f0001", "\U000f0002"


class _SpecialEncoder(Protocol):
    @property
    def specials(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, specials: bool = False) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The templates of one tokenizer by name, and the variables that they may use.

    `variables` are spellings such as `bos_token`; one that the folder does not give is undefined in
    the template.
    """

    templates: Mapping[str, str]
    variables: Mapping[str, str]

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate | None:
        """Reads the templates of a Hugging Face folder; None where it has none.

        `chat_template.jinja` (and `chat_templates/<name>.jinja`) go before `chat_template.json`,
        which goes before `chat_template` of `tokenizer_config.json`.

        Raises:
          UserError: a file that cannot be read, or a template that is no string.
        """
        folder = Path(folder)
        templates = _from_files(folder)
        for name in (TEMPLATE_JSON, "tokenizer_config.json"):
            found = read_json(folder / name, missing_ok=True)
            templates = templates or _named(found, folder / name)
        return cls(templates, token_spellings(folder)) if templates else None

    def source(self, name: str | None = None, *, tools: bool = False) -> str:
        """Returns the template of that name; None is `tool_use` with tools, else `default`.

        Raises:
          UserError: there is no template of that name.
        """
        if name is None:
            name = TOOL_USE if tools and TOOL_USE in self.templates else DEFAULT
        known = [given[:40] for given in self.templates]
        if name not in self.templates:
            raise UserError(f"chat template {name!r}: must be {suggest(name, known)}")
        return self.templates[name]

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        continue_final: bool = False,
        template: str | None = None,
        **extra: Any,
    ) -> str:
        """Returns the text of a conversation.

        Args:
          messages: `{"role": ..., "content": ...}` and whatever else the template reads; entries
            that are None count as absent.
          add_generation_prompt: end with the header of the assistant's answer.
          continue_final: leave the last message open, for the model to go on with it.
          template: the name of a template; see `source`.
          **extra: variables of the template, such as `tools` or `enable_thinking`.

        Raises:
          UserError: no message, both kinds of ending asked for, or an error in the template.
        """
        if not messages:
            raise UserError("chat messages = []: must be at least one message")
        if continue_final and add_generation_prompt:
            raise UserError("continue_final = True: must be False with add_generation_prompt")
        plain: list[Message] = [
            {k: v for k, v in message.items() if v is not None} for message in messages
        ]
        if continue_final:
            plain[-1] = _left_open(plain[-1])
        source = self.source(template, tools=bool(extra.get("tools")))
        values = {"tools": None, "documents": None, **self.variables, **extra}
        values |= {"messages": plain, "add_generation_prompt": add_generation_prompt}
        text = templates.render(source, values)
        return _cut_open(text) if continue_final else text

    def encode(
        self, tokenizer: _SpecialEncoder, messages: Sequence[Message], **options: Any
    ) -> list[int]:
        """Returns the token ids of a conversation; `options` are those of `render`.

        Special tokens that the template writes are tokens; those that a message spells stay text,
        so that no message can end itself or speak for another role.
        """
        names = sorted(tokenizer.specials, key=len, reverse=True)
        special = "|".join(map(re.escape, names)) or "(?!)"
        text = self.render([_marked(message, special) for message in messages], **options)
        # [text, special spelled by a message or None for a mark without its pair, text, ...]
        parts = re.split(f"{_OPEN}({special}){_CLOSE}|[{_OPEN}{_CLOSE}]", text)
        ids = tokenizer.encode(parts[0], specials=True)
        for index, part in enumerate(parts[1:], 1):
            if part:
                ids += encode_inside(tokenizer, part, specials=index % 2 == 0)
        return ids


def token_spellings(folder: Path) -> dict[str, str]:
    """Returns the special tokens that the configs of a folder name: `{"bos_token": "<s>", ...}`.

    As in `transformers`, `special_tokens_map.json` counts only beside a `tokenizer_config.json`
    without `added_tokens_decoder`, and then it goes first.

    Raises:
      UserError: a file that cannot be read, or a token that has no spelling.
    """
    path = folder / "tokenizer_config.json"
    found = read_json(path, missing_ok=True)
    check(found, _TOKENS, path, required=())
    if "added_tokens_decoder" not in found:
        path = folder / "special_tokens_map.json"
        first = read_json(path, missing_ok=True)
        check(first, _TOKENS, path, required=())
        found = {**found, **first}
    return {
        key: spelling(value)
        for key, value in found.items()
        if key.endswith("_token") and TOKEN.accepts(value)
    }


def spelling(token: str | Mapping[str, Any]) -> str:
    """Returns the text of a `TOKEN`."""
    return token if isinstance(token, str) else token["content"]


def _is_spelling(value: Any) -> bool:
    # JSON can spell half of a surrogate pair, which is no character.
    return type(value) is str and value != "" and not re.search("[\ud800-\udfff]", value)


def encode_inside(tokenizer: _SpecialEncoder, text: str, *, specials: bool) -> list[int]:
    """Encodes the middle of a text, without the space that SentencePiece puts before a start."""
    line, ids = tokenizer.encode("\n"), tokenizer.encode("\n" + text, specials=specials)
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return tokenizer.encode(text, specials=specials)


def _from_files(folder: Path) -> dict[str, str]:
    paths = {DEFAULT: folder / TEMPLATE_FILE}
    paths |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    templates = {}
    for name, path in paths.items():
        if path.is_file():
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError) as error:
                raise UserError(f"{path}: not UTF-8 text ({error})") from error
    return templates


def _named(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The `chat_template` of a config: a string, an object by name, or a list of named ones."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    pairs: list[tuple[Any, Any]]
    if isinstance(value, dict):
        pairs = [*value.items()]
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    else:
        pairs = [(None, None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise UserError(f"{path}: chat_template must be a string, or strings by name")
    return dict(pairs)


def _left_open(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError("continue_final = True: must end with a message whose content is a string")
    # The space shows whether the template trims its messages.
    return {**message, "content": f"{content}{_CUT} "}


def _cut_open(text: str) -> str:
    before, mark, after = text.rpartition(_CUT)
    if not mark:
        raise UserError("continue_final = True: the chat template leaves out the last message")
    return before if after.startswith(" ") else before.rstrip()


def _marked(value: Any, special: str) -> Any:
    """Puts marks around the special tokens in every string of a message."""
    if isinstance(value, str):
        clean = re.sub(f"[{_OPEN}{_CLOSE}{_CUT}]", "", value)
        return re.sub(special, lambda found: f"{_OPEN}{found[0]}{_CLOSE}", clean)
    if isinstance(value, Mapping):
        return {key: _marked(entry, special) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(entry, special) for entry in value]
    return value
