"""What a tokenizer loses of a text: characters without a token, capitals, spaces, line ends.

Bits per byte compares tokenizers because all of them pay for the same bytes. One that drops what it
cannot express pays for less, so its number would be too good: there is none for such a text.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from typing import Protocol

SAMPLE = (
    'The quick brown Fox: 3.14 * (x_1 + y) = "z";\n\n\tdef f(a):\n\t\treturn a  # tabs\n'
    "    four spaces,  two   three\nna\u00efve caf\u00e9, \u00dcbergr\u00f6\u00dfe "
    "\u6f22\u5b57\u3068\u4eee\u540d\uff0c\u4e2d\u6587\u7b80\u4f53\u3002 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \u20ac\u00bd\n"
)


class _Tokenizer(Protocol):
    def encode(self, text: str, *, specials: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def keeps(tokenizer: _Tokenizer, text: str, ids: Sequence[int]) -> bool:
    """Whether `ids`, which encode `text`, decode to the same text.

    Canonically equivalent text, such as an accented letter in one character or two, is the same.
    """
    decoded = tokenizer.decode(ids)
    if decoded == text:
        return True
    return unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)


def lost_share(tokenizer: _Tokenizer, text: str = SAMPLE) -> float:
    """Returns the share of the UTF-8 bytes of a short `text` that encoding and decoding lose."""
    ids = tokenizer.encode(text)
    if keeps(tokenizer, text, ids):
        return 0.0
    matcher = difflib.SequenceMatcher(None, text, tokenizer.decode(ids), autojunk=False)
    kept = "".join(text[block.a : block.a + block.size] for block in matcher.get_matching_blocks())
    return 1 - len(kept.encode("utf-8")) / len(text.encode("utf-8"))


def reason(lost_bytes: int, num_bytes: int) -> str:
    """Returns why there are no bits per byte, where texts with `lost_bytes` are not kept."""
    share = 100 * lost_bytes / max(num_bytes, 1)
    return f"no bits/byte: the tokenizer changes texts with {share:.1f}% of the bytes"
