"""The weights of a prompt's words, in the common notation of AUTOMATIC1111's web UI.

    (word)  1.1      ((word))  1.1 * 1.1      (word:1.3)  1.3      [word]  1 / 1.1
    \\( \\) \\[ \\] \\\\   the character itself     BREAK  a new chunk of tokens

Source of the rules: `parse_prompt_attention` of that program. A bracket that is never closed extends to the end of the
prompt. A closing bracket without an opening one is text, and so is a colon without a number. A backslash before any
other character is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from higen.errors import RequestError, quoted

__all__ = ["BREAK", "DEEPEST", "LARGEST", "Piece", "pieces"]

BREAK = "BREAK"
ROUND, SQUARE = 1.1, 1 / 1.1
"""The factors for words in round and in square brackets."""

LARGEST = 100.0
"""The range of weights is -LARGEST to LARGEST."""

DEEPEST = 32
"""The most brackets that may be open at the same time."""

_ESCAPED = "()[]\\"
_SPECIAL = frozenset("()[]:\\")
_DIGITS = frozenset("0123456789")
_NO_NUMBERS = ("nan", "inf", "infinity")


@dataclass(frozen=True)
class Piece:
    """A part of a prompt in which all words have the same weight. `text` None: a new chunk begins here."""

    text: str | None
    weight: float = 1.0


@dataclass
class _Reader:
    """Reader state. `texts`: parts so far, None for a BREAK; `weights`: their weights; `round` and `square`: for each
    open bracket, the index of the first part in it, and for square ones also the bracket's position in the prompt.
    """

    prompt: str
    name: str
    texts: list[str | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    round: list[int] = field(default_factory=list)
    square: list[tuple[int, int]] = field(default_factory=list)

    def text(self, text: str | None) -> None:
        self.texts.append(text)
        self.weights.append(1.0)

    def close(self, first: int, weight: float) -> None:
        for i in range(first, len(self.weights)):
            self.weights[i] *= weight

    def fail(self, reason: str) -> RequestError:
        return RequestError(f"{self.name} {quoted(self.prompt)}: {reason}")


def pieces(prompt: str, name: str = "prompt") -> list[Piece]:
    r"""The parts of a prompt with their weights. Neighbours with equal weights are joined.

    Raises RequestError for a weight that is not a plain decimal number or is beyond 100, for more than 32 open
    brackets, and for `[a:b:0.5]` and `[a|b]`, the web UI's prompt editing, which is not supported. Messages call the
    prompt `name`.
    """
    reader = _Reader(prompt, name)
    i = 0
    while i < len(prompt):
        i = _step(reader, i)
    for first in reader.round:
        reader.close(first, ROUND)
    for first, _ in reader.square:
        reader.close(first, SQUARE)
    return _joined(reader)


def _step(reader: _Reader, i: int) -> int:
    """Read the item at index `i`; returns the index of the next item."""
    prompt, c = reader.prompt, reader.prompt[i]
    if c not in _SPECIAL:
        end = next((j for j in range(i, len(prompt)) if prompt[j] in _SPECIAL), len(prompt))
        _words(reader, prompt[i:end])
        return end
    if c == "\\":
        if escaped := i + 1 < len(prompt) and prompt[i + 1] in _ESCAPED:
            reader.text(prompt[i + 1])
        return i + 1 + escaped
    if c in "([":
        if len(reader.round) + len(reader.square) == DEEPEST:
            raise reader.fail(f"more than {DEEPEST} open brackets; write \\( and \\[ for brackets that are text")
        if c == "(":
            reader.round.append(len(reader.texts))
        else:
            reader.square.append((len(reader.texts), i))
    elif c == ":":
        return _colon(reader, i)
    elif c == ")" and reader.round:
        reader.close(reader.round.pop(), ROUND)
    elif c == "]" and reader.square:
        first, opened = reader.square.pop()
        _check_no_editing(reader, opened, i)
        reader.close(first, SQUARE)
    else:
        reader.text(c)
    return i + 1


def _colon(reader: _Reader, i: int) -> int:
    """`:1.3)` sets the weight of the text in the last round bracket; any other colon is text."""
    prompt = reader.prompt
    start = end = _after_space(prompt, i + 1)
    while end < len(prompt) and (prompt[end] in "+-." or (prompt[end].isascii() and prompt[end].isalnum())):
        end += 1
    closing, number = _after_space(prompt, end), prompt[start:end]
    if not reader.round or closing == len(prompt) or prompt[closing] != ")" or not _is_meant_as_number(number):
        reader.text(":")
        return i + 1
    if not _is_decimal(number):
        raise reader.fail(f"the weight {quoted(number)}: a plain decimal number, as in (word:1.3)")
    reader.close(reader.round.pop(), float(number))
    return closing + 1


def _after_space(text: str, i: int) -> int:
    while i < len(text) and text[i].isspace():
        i += 1
    return i


def _is_meant_as_number(text: str) -> bool:
    """Whether a word looks like a number: digits and dots with or without an exponent, or nan, inf, infinity."""
    bare = text[1:].lower() if text[:1] in ("+", "-") else text.lower()
    mantissa, exponent, power = bare.partition("e")
    digits = bool(_DIGITS & set(mantissa)) and set(mantissa) <= _DIGITS | {"."}
    return bare in _NO_NUMBERS or (digits and (not exponent or _is_whole(power)))


def _is_whole(text: str) -> bool:
    bare = text[1:] if text[:1] in ("+", "-") else text
    return bool(bare) and set(bare) <= _DIGITS


def _is_decimal(text: str) -> bool:
    bare = text[1:] if text[:1] in ("+", "-") else text
    return bare.count(".") <= 1 and bool(_DIGITS & set(bare)) and set(bare) <= _DIGITS | {"."}


def _check_no_editing(reader: _Reader, opened: int, closed: int) -> None:
    """Raise RequestError for `[a|b]` and `[a:b:0.5]`. The latter has a number after its last colon."""
    prompt = reader.prompt
    colon = prompt.rfind(":", opened, closed)
    number = prompt[colon + 1 : closed].strip() if colon >= 0 else ""
    if prompt.find("|", opened, closed) >= 0 or _is_decimal(number):
        raise reader.fail("prompt editing, [from:to:when] and [one|other], is not supported; write \\[ for a bracket")


def _words(reader: _Reader, text: str) -> None:
    """Add a text without special characters; split it at each BREAK that is a separate word."""
    done = at = 0
    while (at := text.find(BREAK, at)) >= 0:
        end = at + len(BREAK)
        alone = (at == 0 or not _is_letter(text[at - 1])) and (end == len(text) or not _is_letter(text[end]))
        if alone:
            reader.text(text[done:at])
            reader.text(None)
            done = end
        at = end
    reader.text(text[done:])


def _is_letter(c: str) -> bool:
    return c.isalnum() or c == "_"


def _joined(reader: _Reader) -> list[Piece]:
    """Join texts of equal weight and drop empty ones. Raises RequestError for a weight that is too large."""
    found: list[Piece] = []
    run: list[str] = []
    weight = 1.0

    def finish() -> None:
        if run and any(run):
            found.append(Piece("".join(run), weight))
        run.clear()

    for text, own in zip(reader.texts, reader.weights, strict=True):
        if text is None:
            finish()
            found.append(Piece(None))
            continue
        if not abs(own) <= LARGEST:
            raise reader.fail(f"the weight {own:g} of {quoted(text)}: from -{LARGEST:g} to {LARGEST:g}")
        if own != weight:
            finish()
            weight = own
        run.append(text)
    finish()
    return found
