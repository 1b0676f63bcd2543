"""Token ids compared with the reference's and with an independent byte-pair encoder; rules for long texts."""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
import warnings
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from random_texts import random_texts
from tokenizers import Tokenizer, models

from higen.errors import IntegrityError, PromptWarning, RequestError
from higen.tables import TextRules
from higen.tokenizer import PromptTokenizer, build_clip_tokenizer, build_word_tokenizer, clean, write_tokenizer

COMPANIONS = Path(__file__).parent / "reference" / "companions" / "companions.json"
CASES = json.loads(COMPANIONS.read_text(encoding="utf-8"))["tokenizer"]
WORDS = ("a", "Blue", "whale", "swimming", ",", "blue")
RULES = TextRules("tokenizer.json")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    build_clip_tokenizer().save(str(path))
    return PromptTokenizer.from_file(path, RULES)


def word_tokenizer(tmp_path: Path, **rules: object) -> PromptTokenizer:
    path = tmp_path / "tokenizer.json"
    build_word_tokenizer(WORDS).save(str(path))
    return PromptTokenizer.from_file(path, TextRules(**{"tokenizer": path.name, "length": 8, "clean": False, **rules}))  # type: ignore[arg-type]


def test_a_tokenizer_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    build_clip_tokenizer().save(str(tmp_path / "theirs.json"))
    write_tokenizer(build_clip_tokenizer(), tmp_path / "ours.json")
    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_tokenizer(build_word_tokenizer(WORDS), Path("/dev/full"))


@pytest.mark.parametrize("case", CASES, ids=[repr(case["text"][:24]) for case in CASES])
def test_ids_equal_the_references(clip: PromptTokenizer, case: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        ids = clip.encode([str(case["text"])])
    assert ids.dtype == np.int64
    assert ids.tolist() == [case["ids"]]


class PlainBPE:
    """CLIP's encoder again in plain Python: merge the pair of the lowest rank until none is left."""

    def __init__(self) -> None:
        packed = files("higen").joinpath("assets", "clip", "merges.txt.gz").read_bytes()
        merges = [tuple(line.split(" ")) for line in gzip.decompress(packed).decode().split("\n")[:-1]]
        printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
        hidden = [b for b in range(256) if b not in printable]
        letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(hidden))]
        self.letter = dict(zip(printable + hidden, letters, strict=True))
        tokens = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[part] for piece in self.pieces(clean(text)) for part in self.merge(piece)]

    @staticmethod
    def pieces(text: str) -> list[str]:
        """Split into contractions, runs of letters, single digits and runs of other marks, by character class."""
        found, i = [], 0
        kinds = [
            " " if c.isspace() else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "?" if c != "\u0345" else " ")
            for c in text
        ]
        while i < len(text):
            start, kind = i, kinds[i]
            contraction = re.match("'(?:[s\u017ftmd]|re|ve|ll)", text[i:])
            if contraction:
                i += contraction.end()
            else:
                i += 1
                while kind in "L?" and i < len(text) and kinds[i] == kind:
                    i += 1
            if kind != " ":
                found.append(text[start:i])
        return found

    def merge(self, piece: str) -> list[str]:
        parts = [self.letter[b] for b in piece.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
            if min(ranks) == len(self.ranks):
                break
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts


def test_ids_are_those_of_an_independent_encoder(clip: PromptTokenizer) -> None:
    plain = PlainBPE()
    for text in random_texts(400, seed=7, more=("\ud800",), most=30):
        wanted = [49406, *plain.encode(text)[:75], 49407]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)
            ids = clip.encode([text])[0].tolist()
        assert ids == wanted + [0] * (77 - len(wanted)), ascii(text)


def test_ids_are_those_of_transformers_on_plain_text(clip: PromptTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = clip.tokenizer
    model = json.loads(tokenizer.to_str())["model"]
    theirs = transformers.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for text in ("a photo of 3 cats", "Don't STOP, they'll say; naïve café!!", "日本 and 한국 😀", "x" * 60):
        assert clip.encode([text])[0].tolist()[: len(theirs(text)["input_ids"])] == theirs(text)["input_ids"]


def test_the_tokenizer_file_gives_the_same_ids_for_plain_text(tmp_path: Path, clip: PromptTokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    build_clip_tokenizer().save(str(path))
    ids = Tokenizer.from_file(str(path)).encode("A  Blue\nWhale's tail").ids
    assert ids == [i for i in clip.encode(["A  Blue\nWhale's tail"])[0].tolist() if i]


def test_cleaning() -> None:
    assert clean(" Ã©tÃ©\n\t&amp;lt;B&amp;gt;  “Hi” ") == 'été <b> "hi"'


def test_a_special_token_in_a_prompt_is_text(clip: PromptTokenizer) -> None:
    ids = clip.encode(["a <|endoftext|> b"])[0].tolist()
    assert ids.count(49407) == 1
    assert ids.count(49406) == 1


def test_a_cut_prompt_keeps_the_end_and_names_the_lost_words(clip: PromptTokenizer) -> None:
    kept = "word " * 74
    with pytest.warns(PromptWarning, match=r"76 tokens, but the model reads 75; words cut off: 'swimming';"):
        ids = clip.encode([kept + "whale swimming"])[0]
    assert ids[-1] == 49407
    assert ids[-2] == clip.encode(["whale"])[0, 1]
    with pytest.warns(PromptWarning, match=r"'w89', 'w90', 'w91' and 108 more") as caught:
        clip.encode([kept + " ".join(f"w{n}" for n in range(80, 200))])
    assert "'w80'" in str(caught[0].message)  # the word's first token fits, its second does not


def test_a_prompt_that_just_fits_is_not_warned_about(clip: PromptTokenizer) -> None:
    ids = clip.encode(["word " * 75, ""])
    assert ids[0, -1] == 49407
    assert ids[1].tolist() == [49406, 49407] + [0] * 75


def test_word_tokenizer(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    assert tokenizer.encode(["A blue\twhale,swimming"]).tolist() == [[1, 4, 5, 6, 8, 7, 2, 0]]
    assert build_word_tokenizer(WORDS).get_vocab_size() == 4 + 5
    assert tokenizer.words() == sorted({word.lower() for word in WORDS} - {","})


def test_unknown_words_are_named(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    with pytest.warns(PromptWarning, match=r"does not know 'purple', '!'; `higen prompts`"):
        ids = tokenizer.encode(["a Purple whale! purple"])
    assert ids.tolist() == [[1, 4, 3, 6, 3, 3, 2, 0]]


def test_a_word_prompt_is_cut_too(tmp_path: Path) -> None:
    with pytest.warns(PromptWarning, match=r"words cut off: 'blue', 'whale'"):
        ids = word_tokenizer(tmp_path, pad_id=9).encode(["a a a a a a blue whale"])
    assert ids.tolist() == [[1, 4, 4, 4, 4, 4, 4, 2]]


@pytest.mark.parametrize("word", ["two words", "", "it's", "!!"])
def test_words_must_be_words(word: str) -> None:
    with pytest.raises(RequestError, match="word"):
        build_word_tokenizer([word])


@pytest.mark.parametrize("prompts", ["a text, not a list", [b"bytes"], [None]])
def test_prompts_must_be_texts(clip: PromptTokenizer, prompts: object) -> None:
    with pytest.raises(RequestError, match="a list of texts"):
        clip.encode(prompts)  # type: ignore[arg-type]


def test_half_a_surrogate_pair_is_refused_without_cleaning(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        word_tokenizer(tmp_path).encode(["a \ud800 whale"])


def test_malformed_files(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        PromptTokenizer.from_file(path, RULES)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError, match="not a tokenizer"):
        PromptTokenizer.from_file(path, RULES)
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(IntegrityError, match=r"no token <\|startoftext\|>"):
        PromptTokenizer.from_file(path, RULES)


def test_a_requests_own_warn_is_called(tmp_path: Path) -> None:
    told: list[Warning] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        word_tokenizer(tmp_path).encode(["a purple whale a a a a a"], told.append)
    assert [type(warning) for warning in told] == [PromptWarning] * 2
    assert "'purple'" in str(told[0])
    assert "words cut off: 'a', 'a'" in str(told[1])


def test_a_warning_quotes_no_word_of_a_megabyte(tmp_path: Path) -> None:
    told: list[Warning] = []
    word_tokenizer(tmp_path).encode(["x" * 10**6], told.append)
    assert len(str(told[0])) < 200
    assert f"'{'x' * 40}...'" in str(told[0])
