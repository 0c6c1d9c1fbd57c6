"""Token ids to text, one by one: what is given is never taken back, and little is held back.

Where tokens stand for bytes, a character may be cut over several of them: at most the 3 bytes of an
unfinished one are held back. Bytes that are no UTF-8 become U+FFFD as Unicode recommends, one for
each longest piece that could begin a character.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

# Ids of a prompt that can change how the next one decodes, with room to spare.
_CONTEXT = 16
_ALL = 2**31  # More spaces than any text begins with.
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class StreamDecoder(Protocol):
    """Turns generated ids into text one by one; text once given is never taken back.

    All pieces of a text together are what `decode` gives for all of its ids.
    """

    def push(self, token_id: int) -> str:
        """Returns the characters that `token_id` completes, often one, sometimes none."""
        raise NotImplementedError

    def flush(self) -> str:
        """Returns the text still held back; an unfinished character becomes U+FFFD."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A decoder under which every id stands for the same bytes, wherever it stands.

    Attributes:
      of: the bytes of an id, none for ids that `decode` drops.
      strip: the most spaces that a text loses at its beginning (those that encoding put there).
      restarts: ids after which a text begins anew.
    """

    of: Callable[[int], bytes]
    strip: int = 0
    restarts: Collection[int] = ()

    def stream(self, before: Sequence[int] = ()) -> PieceStream:
        """Returns a decoder of the ids after `before`."""
        return PieceStream(self, before)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        if not self.restarts:
            content = b"".join(map(self.of, ids))
            spaces = len(content) - len(content.lstrip(b" "))
            return content[min(spaces, self.strip) :].decode("utf-8", errors="replace")
        stream = PieceStream(self, ())
        return "".join([stream.push(int(index)) for index in ids]) + stream.flush()


class PieceStream:
    """The stream of `Pieces`."""

    def __init__(self, pieces: Pieces, before: Sequence[int]) -> None:
        self._pieces, self._left = pieces, pieces.strip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for index in before:
            self._bytes(int(index))

    def _bytes(self, token_id: int) -> bytes:
        content = self._pieces.of(token_id)
        if self._left and content:
            stripped = content.lstrip(b" ")
            spaces = min(len(content) - len(stripped), self._left)
            content = content[spaces:]
            self._left = 0 if content else self._left - spaces
        if token_id in self._pieces.restarts:
            self._left = self._pieces.strip
        return content

    def push(self, token_id: int) -> str:
        """See `StreamDecoder`."""
        return self._decoder.decode(self._bytes(token_id))

    def flush(self) -> str:
        """See `StreamDecoder`."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class WindowStream:
    """Decodes the last emitted ids together with the new ones and emits the difference.

    For decoders that treat an id by its neighbours. The earlier ids are needed because a piece may
    decode differently at the start of a text. Where tokens stand for bytes, up to 3 that may go on
    are held back.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        before: Sequence[int],
        *,
        is_dropped: Callable[[int], bool],
        may_cut: bool,
    ) -> None:
        """Args:
        decode: from ids to text.
        before: ids before the stream.
        is_dropped: ids that `decode` leaves out.
        may_cut: whether a character may be cut over several ids.
        """
        self._decode, self._is_dropped = decode, is_dropped
        self._most = 3 if may_cut else 0
        self._context = [i for i in before if not is_dropped(i)][-_CONTEXT:]
        self._pending: list[int] = []

    def _emit(self) -> str:
        if not self._pending:
            return ""
        text = self._decode(self._context + self._pending)
        if self._most and text.endswith("\ufffd"):
            # Some decoders take the bytes of whole characters before for broken ones then.
            text = self._decode(self._pending)
        else:
            text = text[len(self._decode(self._context)) :]
        self._context, self._pending = self._pending, []
        return text

    def push(self, token_id: int) -> str:
        """See `StreamDecoder`."""
        if self._is_dropped(token_id):
            return ""
        self._pending.append(token_id)
        if len(self._pending) > self._most:
            return self._emit()
        may_go_on = self._decode(self._context + self._pending).endswith("\ufffd")
        return "" if may_go_on else self._emit()

    def flush(self) -> str:
        """See `StreamDecoder`."""
        return self._emit()


class _Table(dict):
    """The bytes of ids, each computed once."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = found = self._compute(token_id)
        return found


def sentencepiece_pieces(
    model: Any,
    texts: dict[int, str],
    dropped: Collection[int],
    *,
    strips_all: bool,
    strips_one: bool,
    restarts: Collection[int],
) -> Pieces:
    """Returns the pieces of a SentencePiece model.

    Args:
      model: the processor.
      texts: ids of tokens beyond the model, and their texts.
      dropped: ids that are no text.
      strips_all, strips_one: which spaces at the beginning of a text the model puts there or drops.
      restarts: see `Pieces`.
    """
    size = model.vocab_size()

    def compute(token_id: int) -> bytes:
        if token_id in texts:
            return texts[token_id].encode("utf-8")
        if not 0 <= token_id < size or token_id in dropped or model.is_control(token_id):
            return b""
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if model.is_unknown(token_id):
            return model.decode([token_id]).encode("utf-8")
        return piece.replace("\u2581", " ").encode("utf-8")

    strip = _ALL if strips_all else int(strips_one)
    return Pieces(_Table(compute).__getitem__, strip, frozenset(restarts))


def hugging_face_pieces(model: Any, dropped: Collection[int]) -> Pieces | None:
    """Returns the pieces of a `tokenizers.Tokenizer`; None where its decoder is not that simple.

    Simple are the decoders of byte-level BPE, and of BPE with bytes for unknown characters: a
    `Replace` of strings, `ByteFallback`, `Fuse`, then a `Strip` of leading spaces.
    """
    stages, strip = decoder_stages(model), 0
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        to_bytes = _byte_level
    else:
        simple = _simple(stages)
        if simple is None:
            return None
        to_bytes, strip = simple

    def compute(token_id: int) -> bytes:
        token = None if token_id < 0 or token_id in dropped else model.id_to_token(token_id)
        return b"" if token is None else to_bytes(token)

    return Pieces(_Table(compute).__getitem__, strip)


def _simple(stages: list[dict[str, Any]]) -> tuple[Callable[[str], bytes], int] | None:
    """From a token to its bytes, and the spaces that a text loses; None if it is not that simple.

    What stands behind `Fuse` works on the whole text, what stands before it on single tokens.
    """
    pairs: list[tuple[str, str]] = []
    strip, has_bytes, is_fused = 0, False, False
    for stage in stages:
        match stage:
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not (
                has_bytes or is_fused
            ):
                pairs.append((old, new))
            case {"type": "ByteFallback"} if not is_fused:
                has_bytes = True
            case {"type": "Strip", "content": " ", "start": start, "stop": 0} if (
                is_fused and not strip
            ):
                strip = start
            case _:
                return None

    def to_bytes(token: str) -> bytes:
        for old, new in pairs:
            token = token.replace(old, new)
        found = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return bytes([int(found[1], 16)]) if found else token.encode("utf-8")

    return (to_bytes, strip) if stages else None


def decoder_stages(model: Any) -> list[dict[str, Any]]:
    """Returns the decoders of a `tokenizers.Tokenizer` one after another, as in its file."""
    if model.decoder is None:
        return []
    state = json.loads(model.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def may_cut_characters(model: Any) -> bool:
    """Whether a decoder of a `tokenizers.Tokenizer` makes text of bytes."""
    return model.decoder is not None and any(
        name in model.decoder.__getstate__() for name in (b'"ByteLevel"', b'"ByteFallback"')
    )


def _bytes_of_characters() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _bytes_of_characters()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")  # An added token, which is spelled as it is.
