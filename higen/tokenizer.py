"""Turns prompts into token ids: CLIP's byte-pair tokenizer, and a plain word tokenizer for small models.

Reference: open_clip's tokenizer.py as VGen uses it (pad 0, truncation keeps the end token); spec section 7, Text.
"""

from __future__ import annotations

import gzip
import html
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from higen.errors import IntegrityError, PromptWarning, RequestError, quoted
from higen.prompt_chunks import Chunks, Reading
from higen.prompt_weights import Piece, pieces
from higen.request import Warn
from higen.tables import TextRules

__all__ = [
    "END",
    "PAD",
    "START",
    "UNKNOWN",
    "PromptTokenizer",
    "build_clip_tokenizer",
    "build_word_tokenizer",
    "clean",
    "write_tokenizer",
]

START, END, PAD, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "[PAD]", "[UNK]"

# The reference's pattern ignores case. So its `'s` also matches ' with the long s (U+017F), and nothing matches U+0345,
# the only mark that is lower case and not a letter.
_CLIP_PIECES = r"'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_WORD_PIECES = r"\w+|[^\w\s]"
_NAMED = 12
"""The most words that a warning names."""

_LONGEST = 40
"""The most letters of a word that a warning quotes."""


def clean(text: str) -> str:
    """A prompt cleaned as in CLIP: ftfy, HTML unescaped twice, white space collapsed, lower case."""
    import ftfy  # the import takes 70 ms, and small models do not need it

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer with its model's rules for cleaning, padding and cutting."""

    tokenizer: Tokenizer
    rules: TextRules

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], rules: TextRules) -> PromptTokenizer:
        """Read a tokenizer.json. Raises IntegrityError if it is malformed or lacks a start or end token."""
        try:
            tokenizer = Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises bare Exception
            raise IntegrityError(f"{os.fspath(path)}: not a tokenizer: {error}") from error
        for token in (START, END):
            _id(tokenizer, token)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # As in the reference, a special token that is written in a prompt is ordinary text.
        tokenizer.encode_special_tokens = True
        return cls(tokenizer, rules)

    def words(self) -> list[str] | None:
        """Every word (no punctuation) that a word-level tokenizer knows, sorted; None for a tokenizer that splits words
        into pieces."""
        if not isinstance(self.tokenizer.model, models.WordLevel):
            return None
        special = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        return sorted(word for word in self.tokenizer.get_vocab().keys() - special if any(map(str.isalnum, word)))

    def encode(
        self, prompts: Sequence[str], warn: Warn | None = None, names: Sequence[str] | None = None
    ) -> NDArray[np.int64]:
        """Token ids of the prompts as plain texts, int64 [B, L]: start, text, end, then `pad_id` up to `length`.

        A prompt that is too long is cut before the end token. A PromptWarning names the words that are lost, or that a
        word-level tokenizer does not know. `warn` is called with each warning; None: warnings.warn.
        `names`: the name of each prompt in warnings and errors; None: "prompt".
        Raises RequestError for anything but texts.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestError(f"prompts={quoted(prompts)}: a list of texts is wanted")
        start, end = _id(self.tokenizer, START), _id(self.tokenizer, END)
        room = self.rules.length
        ids = np.full((len(prompts), room), self.rules.pad_id, dtype=np.int64)
        for row, prompt, name in zip(ids, prompts, names or ["prompt"] * len(prompts), strict=True):
            tokens = [start, *self._text_ids(prompt, name, warn or _warn)[: room - 2], end]
            row[: len(tokens)] = tokens
        return ids

    def read(self, prompt: str, warn: Warn | None = None, name: str = "prompt") -> Reading:
        """A prompt in chunks, with the weights of its words, according to the rules `weights` and `chunks`.

        Text beyond the last chunk is cut off, with a PromptWarning. Raises RequestError for invalid weights.
        """
        start, end = _id(self.tokenizer, START), _id(self.tokenizer, END)
        if self.rules.plain:
            ids = self.encode([prompt], warn, [name])
            blank = self.encode([""])[0]
            return Reading(ids, np.ones(ids.shape, np.float32), blank)
        warn, rules = warn or _warn, self.rules
        chunks = Chunks(rules.length - 2, rules.chunks, self.tokenizer.token_to_id(",</w>"))
        parts = pieces(prompt, name) if rules.weights else [Piece(prompt)]
        for i, part in enumerate(parts):
            if part.text is None:
                chunks.begin()
                continue
            text, encoding = self._encoded(part.text, prompt, name)
            self._warn_of_unknown_words(text, name, encoding, warn)
            lost = chunks.add(encoding.ids, part.weight)
            if lost is not None:
                rest = [text[_word_start(text, encoding, lost) :], *(other.text or "" for other in parts[i + 1 :])]
                named = _named(" ".join(rest).split())
                most = (
                    f"{rules.length - 2} tokens" if rules.chunks == 1 else f"{rules.chunks} x {rules.length - 2} tokens"
                )
                warn(PromptWarning(f"{name}: the model reads {most}; words cut off: {named}; use fewer words"))
                break
        return chunks.reading(start, end, rules.pad_id)

    def _text_ids(self, prompt: str, name: str, warn: Warn) -> list[int]:
        text, encoding = self._encoded(prompt, prompt, name)
        self._warn_of_unknown_words(text, name, encoding, warn)
        self._warn_of_lost_words(text, name, encoding, warn)
        return encoding.ids

    def _encoded(self, part: str, prompt: str, name: str) -> tuple[str, Encoding]:
        """The cleaned text of a part of a prompt, and its tokens."""
        text = clean(part) if self.rules.clean else part
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{name} {quoted(prompt)}: not valid Unicode: {error.reason}") from error
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def _warn_of_unknown_words(self, text: str, name: str, encoding: Encoding, warn: Warn) -> None:
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        spans = [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i == unknown]
        if spans:
            words = list(dict.fromkeys(text[start:end].lower() for start, end in spans))
            known = "`higen prompts` lists the words it knows"
            warn(PromptWarning(f"{name}: this model does not know {_named(words)}; {known}"))

    def _warn_of_lost_words(self, text: str, name: str, encoding: Encoding, warn: Warn) -> None:
        room = self.rules.length - 2
        if len(encoding.ids) <= room:
            return
        lost = _named(text[_word_start(text, encoding, room) :].split())
        message = f"{name} has {len(encoding.ids)} tokens, but the model reads {room}; words cut off: {lost}"
        warn(PromptWarning(f"{message}; use fewer words"))


def build_clip_tokenizer() -> Tokenizer:
    """CLIP's byte-pair tokenizer with OpenAI's 49,408 tokens and open_clip's ids: 49406 is start, 49407 is end."""
    packed = files("higen").joinpath("assets", "clip", "merges.txt.gz").read_bytes()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in _lines(packed))]
    letters = _byte_letters()
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(left + right for left, right in merges), START, END]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=END,
            end_of_word_suffix="</w>",
        )
    )
    return _finish(tokenizer, _CLIP_PIECES, [START, END], pre_tokenizers.ByteLevel(False, use_regex=False))


def build_word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer with one id per lower-case word. Each punctuation mark is a separate word.

    Ids: [PAD] 0, <|startoftext|> 1, <|endoftext|> 2, [UNK] 3, then the words in the given order without repeats.
    Raises RequestError for an entry that is not a single word.
    """
    specials = [PAD, START, END, UNKNOWN]
    tokens = list(dict.fromkeys([*specials, *(word.lower() for word in words)]))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer = _finish(tokenizer, _WORD_PIECES, specials)
    for word in tokens[len(specials) :]:
        if len(tokenizer.encode(word, add_special_tokens=False).tokens) != 1:
            raise RequestError(f"word {quoted(word)}: letters and digits, or one punctuation mark, without white space")
    return tokenizer


def _finish(tokenizer: Tokenizer, pieces: str, specials: list[str], *more: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Add normalisation, splitting into `pieces`, and start and end. Other readers of the file get usable ids, too."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(pieces), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, *more])
    tokenizer.add_special_tokens(specials)
    frame = [(token, _id(tokenizer, token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=frame)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the same file as the library's `save`. On a full disk this raises OSError, not a bare Exception."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise IntegrityError(f"the tokenizer has no token {token}")
    return found


def _word_start(text: str, encoding: Encoding, token: int) -> int:
    """The index at which the word of a token begins. A word counts as lost if any of its tokens is lost."""
    first = int(encoding.offsets[token][0])
    while first > 0 and not text[first - 1].isspace():
        first -= 1
    return first


def _byte_letters() -> list[str]:
    """A printable character for each byte, in the order of CLIP's ids: first the printable bytes, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(others)]


def _lines(packed: bytes) -> list[str]:
    return gzip.decompress(packed).decode("utf-8").splitlines()


def _named(words: Sequence[str]) -> str:
    rest = len(words) - _NAMED
    return ", ".join(repr(word if len(word) <= _LONGEST else f"{word[:_LONGEST]}...") for word in words[:_NAMED]) + (
        f" and {rest} more" if rest > 0 else ""
    )


def _warn(warning: Warning) -> None:
    warnings.warn(warning, stacklevel=6)
