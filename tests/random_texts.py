"""Random texts for comparing tokenizers with their C++ counterparts."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

__all__ = ["ORDINARY", "random_texts"]

ORDINARY = (
    *("a", "blue", "Whale", "SWIMMING", "don't", "they'LL", "it\u2019s", "\u201cHi\u201d", "naïve", "l\u2019été"),
    *("Ελλάδα", "ΟΔΟΣ", "Россия", "日本語", "한국어", "हिन्दी", "العربية", "עברית", "Tiếng", "Việt", "straße"),
    *("æther", "İstanbul", "¿qué?", "cœur", "Ørsted", "😀", "👍🏽", "3.14", "20°C", "½", "R&B", "AT&T", "50€"),
    *("rock & roll", "ＦＵＬＬ", "ﬁsh", "\u3000", "x_y", "<b>", "100%", "—", "…", "#1", "(tail)", "!!", "~"),
)
"""Ordinary text."""

ODD = (
    *("'\u017f", "²", "&amp;amp;", "&lt;b&gt;", "&#233;", "&copy", "ΣΑΣ", "ŉ", "ß", "x\u200by", "i\u0307"),
    *("a\x1cb", "\x85", "e\u0301", "_", "\x00", "<|endoftext|>", "\u0345", "\u212a", "\U0001d518\U0001d52b"),
    *("\u2177", "Ã©", "â€™", "\x1b[31m", "\ufeff", "Â ", "œ ", "вЂ", "é\u201d", "'s", "'S", "\u03a3\u0301"),
    *("\r\n", "\u2028", "①", "ǅ", "ﬀ", "ｶﾞ"),
)
"""Text that cleaning, lower-casing or the rules for splitting treat specially."""

RANGES = ((32, 126), (128, 0x2FF), (0x300, 0x2FFF), (0x3000, 0xFFFF), (0x10000, 0x1FFFF))


def random_texts(
    count: int, seed: int, words: Sequence[str] | None = None, more: Sequence[str] = (), most: int = 14
) -> list[str]:
    """Texts of up to `most` pieces. A piece is one of `words` with white space or, without `words`, some Unicode
    characters or one of `more`.
    """
    generator = random.Random(seed)
    scraps = (*ORDINARY, *ODD, *more)

    def character() -> str:
        char = chr(generator.randint(*generator.choice(RANGES)))
        return char if unicodedata.category(char) not in ("Cn", "Cs") else " "  # letters of newer Unicodes differ

    def scrap() -> str:
        if words is not None:
            return generator.choice(words) + generator.choice((" ", " ", ", ", "\n", "\t "))
        return (generator.choice(scraps) if generator.random() < 0.6 else character()) + generator.choice(("", "", " "))

    return ["".join(scrap() for _ in range(generator.randint(0, most))) for _ in range(count)]
