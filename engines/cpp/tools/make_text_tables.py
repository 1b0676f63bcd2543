"""Write src/text_tables.inc: properties of characters for the C++ tokenizer, taken from the libraries that Python uses.

    python engines/cpp/tools/make_text_tables.py

The character classes and the lower case are those of the `tokenizers` package (Oniguruma, Rust). White space and the
rule of the final sigma are Python's. The replacements and the classes of suspicious characters are ftfy's. Nothing is
copied by hand: the tables are the libraries' results for each character.
"""

from __future__ import annotations

import html.entities
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import ftfy.badness
import ftfy.chardata
import tokenizers
from tokenizers import Regex, normalizers

ALL = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
OUTPUT = Path(__file__).resolve().parents[1] / "src" / "text_tables.inc"


def matched(pattern: str) -> set[int]:
    """The characters that match an Oniguruma pattern on their own."""
    rest = normalizers.Replace(Regex(pattern), "")
    blocks = ("".join(map(chr, ALL[i : i + 512])) for i in range(0, len(ALL), 512))
    return set(ALL) - {ord(c) for block in blocks for c in rest.normalize_str(block)}


def character_classes() -> dict[str, set[int]]:
    """The classes in the tokenizers' patterns. Oniguruma's \\w differs inside and outside brackets."""
    classes = {"letters": matched(r"\p{L}"), "numbers": matched(r"\p{N}"), "white_space": matched(r"\s")}
    words, marks = matched(r"\w"), matched(r"[^\w\s]")
    clip_marks = matched(r"[^\s\p{L}\p{N}]")
    if set(ALL) - words - marks != classes["white_space"] - words:
        raise SystemExit("characters that are neither words nor white space nor marks")
    if set(ALL) - clip_marks != set.union(*classes.values()):
        raise SystemExit("classes that differ inside and outside of brackets")
    return classes | {"word_characters": words}


def ranges(members: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of neighbours, both ends included."""
    runs: list[tuple[int, int]] = []
    for c in sorted(members):
        if runs and runs[-1][1] == c - 1:
            runs[-1] = (runs[-1][0], c)
        else:
            runs.append((c, c))
    return runs


def final_sigma_before(prefix: str) -> set[int]:
    """Characters c for which the sigma in prefix + c + SIGMA is a final sigma."""
    return {c for c in ALL if f"{prefix}{chr(c)}\u03a3".lower().endswith("\u03c2")}


def rows(cells: Iterable[str]) -> str:
    """Cells in lines of at most 120 characters."""
    lines, line = [], "   "
    for cell in cells:
        if len(line) + len(cell) + 2 > 120:
            lines.append(line)
            line = "   "
        line += f" {cell},"
    return "\n".join([*lines, line])


def range_table(name: str, members: Iterable[int]) -> str:
    """A table of ranges."""
    return f"inline constexpr Range {name}[] = {{\n{rows(f'{{0x{a:x}, 0x{b:x}}}' for a, b in ranges(members))}\n}};\n"


def pair_table(name: str, pairs: dict[int, int]) -> str:
    """A table from a character to a number."""
    cells = rows(f"{{0x{a:x}, 0x{b:x}}}" for a, b in sorted(pairs.items()))
    return f"inline constexpr Pair {name}[] = {{\n{cells}\n}};\n"


def text_table(name: str, texts: dict[int, str]) -> str:
    """A table from a character to a UTF-8 text."""

    def quoted(text: str) -> str:
        return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'

    cells = rows(f"{{0x{a:x}, {quoted(b)}}}" for a, b in sorted(texts.items()))
    return f"inline constexpr Replacement {name}[] = {{\n{cells}\n}};\n"


def lower_case() -> dict[int, int]:
    """Lower case of single characters, without U+0130: it is the only one that becomes two, and text.cpp handles it."""
    lower: Callable[[str], str] = normalizers.Lowercase().normalize_str
    changed = {c: lower(chr(c)) for c in ALL if lower(chr(c)) != chr(c)}
    longer = [c for c, text in changed.items() if len(text) != 1]
    if longer != [0x130] or changed[0x130] != "i\u0307":
        raise SystemExit(f"lower case of several characters: {longer}")
    for c, text in changed.items():  # Python's lower case is the same if its Unicode version has the character
        if unicodedata.category(chr(c)) != "Cn" and c != 0x3A3 and chr(c).lower() != text:
            raise SystemExit(f"U+{c:04X}: Python and Rust differ")
    return {c: ord(text) for c, text in changed.items() if c != 0x130}


def suspicion() -> dict[str, set[int]]:
    """ftfy's about 500 characters that occur in mojibake, in the kinds that src/cleaning.cpp tells apart."""
    kinds = {
        name: {c for c in range(0x80, 0x10000) if re.match(f"[{members}]", chr(c))}
        for name, members in ftfy.badness.MOJIBAKE_CATEGORIES.items()
    }
    cased = {"upper_accented", "lower_accented", "upper_common", "lower_common", "kaomoji"}
    letters = {c for name in cased for c in kinds[name] if chr(c).isalpha()}
    named = {c for c in range(0x80, 0x10000) if chr(c) in ftfy.badness.BADNESS_RE.pattern}
    quotes = (kinds["start_punctuation"] | kinds["end_punctuation"]) - {0x201A}  # U+201A has rules of its own
    harmless = kinds["common"] - {0xB4}
    other = set.union(named, *kinds.values()) - letters - quotes - harmless
    return {
        "upper_accented": kinds["upper_accented"],
        "suspicious_letters": letters,
        "suspicious_quotes": quotes,
        "suspicious_commons": harmless,
        "suspicious_others": other,
    }


def main() -> None:
    """Make the tables and write the file."""
    removed = {c for c, text in ftfy.chardata.CONTROL_CHARS.items() if text is None}
    replaced = {**ftfy.chardata.LIGATURES, **ftfy.chardata.WIDTH_MAP}
    for c in range(0x80, 0x10000):
        for pattern, quote in ((ftfy.chardata.SINGLE_QUOTE_RE, "'"), (ftfy.chardata.DOUBLE_QUOTE_RE, '"')):
            if pattern.fullmatch(chr(c)):
                replaced[c] = quote
    alone, between = final_sigma_before(""), final_sigma_before("A")
    legacy = sorted(name for name in html.entities.html5 if not name.endswith(";"))
    parts = [
        f"// Made by tools/make_text_tables.py with tokenizers {tokenizers.__version__}, ftfy {ftfy.__version__} and\n"
        f"// Unicode {unicodedata.unidata_version}. Do not edit.\n",
        *(range_table(name, members) for name, members in character_classes().items()),
        range_table("python_white_space", {c for c in ALL if chr(c).isspace()}),
        pair_table("lower_case", lower_case()),
        range_table("cased", alone),
        range_table("case_ignorable", between - alone),
        pair_table("combining_class", {c: unicodedata.combining(chr(c)) for c in ALL if unicodedata.combining(chr(c))}),
        range_table("not_nfc", {c for c in ALL if not unicodedata.is_normalized("NFC", chr(c))}),
        range_table("composing", composing()),
        range_table("removed_controls", removed),
        text_table("replacements", replaced),
        *(range_table(name, members) for name, members in suspicion().items()),
        "inline constexpr std::string_view legacy_entities[] = {\n" + rows(f'"{n}"' for n in legacy) + "\n};\n",
    ]
    OUTPUT.write_text("\n".join(parts), encoding="utf-8")
    sys.stdout.write(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes\n")


def composing() -> set[int]:
    """Characters that NFC may combine with the one before them (the quick check says "maybe")."""
    second = set()
    for c in ALL:
        parts = unicodedata.decomposition(chr(c)).split()
        if len(parts) == 2 and not parts[0].startswith("<") and unicodedata.is_normalized("NFC", chr(c)):
            second.add(int(parts[1], 16))
    return second | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # Hangul vowels and finals


if __name__ == "__main__":
    main()
