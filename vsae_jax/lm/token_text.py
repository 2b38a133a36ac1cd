"""The text of single tokens, for people to look at.

A token need not be whole characters: bytes that are not UTF-8 by themselves are shown
as \\x and two digits.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(
    tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]
) -> dict[int, str]:
    """What each id adds to a text, its leading space included."""
    ids = sorted({int(i) for i in ids})
    special = tokenizer.added_tokens_decoder
    byte_of = _byte_of()
    known = set(byte_of)
    pieces = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
    byte_level = "\u0120" in "".join(tokenizer.get_vocab())
    texts = {}
    for i, piece in pieces.items():
        if piece is None:
            texts[i] = f"<{i}>"
        elif i in special:
            texts[i] = special[i].content
        elif byte_level and known.issuperset(piece):
            texts[i] = _text(bytes(byte_of[c] for c in piece))
        elif match := _BYTE.fullmatch(piece):
            texts[i] = _text(bytes([int(match[1], 16)]))
        else:
            texts[i] = piece.replace("\u2581", " ")
    return texts


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _byte_of() -> dict[str, int]:
    """The bytes that byte-level BPE's characters stand for (GPT-2's table): printable
    Latin-1 is itself, the others follow one another from U+0100."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(itself)]
    table = {chr(b): b for b in itself}
    return table | {chr(256 + n): b for n, b in enumerate(others)}
