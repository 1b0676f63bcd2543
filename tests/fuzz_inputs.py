"""Mutated input files. Each must be read as an independent reader reads it, or raise a typed error of one line.

python tests/fuzz_inputs.py 10000 [SEED]       the campaign; tests/test_fuzz_inputs.py runs a fixed sample
"""

from __future__ import annotations

import io
import json
import random
import re
import signal
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as as_safetensors

from higen.api import default_model
from higen.bundle import Bundle
from higen.engines.shapes import read_profile
from higen.errors import CheckpointError, HigenError, RequestError, SettingsError
from higen.families.higen import spec
from higen.models.checkpoint_files import read_names, read_state
from higen.train.data import list_items
from higen.train.networks import read_architecture
from higen.train.settings import flat, read_settings

SECONDS = 20
"""Time limit per file, which stops a reader that hangs; a file normally takes far less."""

Check = Callable[[Path, bytes], None]
"""Reads a file and compares the result with its bytes; raises AssertionError if they differ."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, whole examples, the error that it may raise, and the check."""

    name: str
    examples: tuple[bytes, ...]
    error: type[HigenError]
    check: Check


def text_of(data: bytes) -> str:
    """The text of a file without byte order marks, as a plain reader decodes it."""
    while data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


# Text files.


def check_caption(file: Path, data: bytes) -> None:
    items = list_items(file.parent).items
    assert [item.caption for item in items] == [text_of(data).strip()]


def fields(text: str) -> Iterator[list[str]]:
    """The records of a CSV file by RFC 4180, character by character. Raises ValueError for an invalid file."""
    row, value, state, i = [], "", "start", 0
    while i < len(text):
        c = text[i]
        if state == "quoted":
            if c != '"':
                value += c
            elif text[i + 1 : i + 2] == '"':
                value, i = value + '"', i + 1
            else:
                state = "closed"
        elif c in ",\n":
            row, value, state = [*row, value], "", "start"
            if c == "\n":
                yield row
                row = []
        elif c == '"' and state == "start":
            state = "quoted"
        elif state == "closed":
            raise ValueError("text after a quote")
        else:
            value, state = value + c, "plain"
        i += 1
    if state == "quoted":
        raise ValueError("an open quote")
    if row or value or state != "start":
        yield [*row, value]


def check_csv(file: Path, data: bytes) -> None:
    found = list_items(file)
    header, *rows = (row for row in fields(text_of(data)) if row != [""])
    for row in rows:
        assert not any(value.strip() for value in row[len(header) :]), "a value was lost"
    named = [dict(zip(header, row, strict=False)) for row in rows]
    assert len(found.items) + len(found.skipped) <= len(named)
    kept = [(row["path"], row["caption"].strip()) for row in named if row["path"] not in found.skipped]
    assert [(item.name, item.caption) for item in found.items] == kept
    for _, caption in kept:
        assert not re.search(r"\n[^,\n]*\.(mp4|png|webm),", caption), "rows ran together"


def check_jsonl(file: Path, data: bytes) -> None:
    found = list_items(file)
    rows = [json.loads(line) for line in text_of(data).split("\n") if line.strip()]
    kept = [(row["path"], row["caption"].strip()) for row in rows if row["path"] not in found.skipped]
    assert [(item.name, item.caption) for item in found.items] == kept


def check_settings(file: Path, data: bytes) -> None:
    found = flat(read_settings(file))
    for section, keys in tomllib.loads(text_of(data)).items():
        for name, value in keys.items():
            read = found[f"{section}.{name}"]
            if isinstance(value, str) and isinstance(read, str) and read != value:
                assert read == str(file.parent / value), (section, name)
            else:
                assert read == value, (section, name)


def check_profile(file: Path, data: bytes) -> None:
    found = read_profile(str(file), MANIFEST)
    for name, value in tomllib.loads(text_of(data)).items():
        if name != "about" and value != "default":
            assert list(getattr(found, name).sizes) == (value if isinstance(value, list) else [value] * 3)


def check_architecture(file: Path, data: bytes) -> None:
    found = read_architecture(file, CONFIG)
    given = json.loads(text_of(data)) if file.suffix == ".json" else tomllib.loads(text_of(data))
    assert found.name == given.get("name", "")
    for section in ("unet", "defaults"):
        for name, value in given.get(section, {}).items():
            read = getattr(getattr(found, section), name)
            assert (list(read) if isinstance(read, tuple) else read) == value, (section, name)


# Checkpoints.

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([1.5, -2.0])}


def saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def check_archive(file: Path, data: bytes) -> None:
    """An archive has checksums, so whatever can be read equals what was saved."""
    found = read_state(file)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def check_plain(file: Path, data: bytes) -> None:
    """Formats without checksums: the result maps names to tensors, and the names are those of the header."""
    found = read_state(file)
    assert found
    assert all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in found.items())
    assert read_names(file) == found.keys()


CAPTIONS = (
    b"a blue whale, swimming",
    "  « un cœur » bat\n".encode(),
    b"\xef\xbb\xbfa red heart\r\nbeating\r\n",
    "鯨が泳ぐ\n".encode(),
)
CSVS = (
    b'path,caption\na.mp4,a dog\nb.png,"a cat, asleep"\nc.webm,"a ""red"" heart"\n',
    b'\xef\xbb\xbfcaption,path,more\r\na dog,a.mp4,1\r\n"two\r\nlines",b.mp4,2\r\n,c.mp4,\r\n',
)
JSONLS = (
    b'{"path": "a.mp4", "caption": "a dog"}\n{"caption": "a \\"cat\\" \\u00e9", "path": "b/c.png", "n": 1}\n',
    b'\xef\xbb\xbf{"path": "a.mp4", "caption": "x", "tags": ["y", {"z": null}]}\r\n\r\n',
)
SETTINGS = (
    b'[model]\ninit = "m"\n[data]\npath = "clips"\nframes = 16\nfps = 8\n[run]\noutput = "o"\nsteps = 100\nseed = 7\n'
    b"[optimiser]\nlearning_rate = 3e-5\nbetas = [0.9, 0.99]\n[cues]\nas_numbers = 0.25\n",
    b'\xef\xbb\xbf[model]\r\narchitecture = "a.toml"\r\ncompanions = "m"\r\n[data]\r\npath = "c.csv"\r\n[run]\r\n'
    b'output = "o"\r\nsteps = 5\r\nsample_every = 1\r\nsample_prompts = ["a whale", "a crab"]\r\n',
)
PROFILES = (
    b'about = "one"\nbatch = 1\nframes = "default"\nheight = [128, 128, 256]\nwidth = 128\nimages = [1, 2, 4]\n',
    b"batch = [1, 2, 4]\nframes = [8, 16, 32]\nheight = 256\nwidth = 256\nimages = 'default'\n",
)
JSON_ARCHITECTURES = (b'{"name": "n", "unet": {"base_channels": 64, "blocks_per_level": 1, "dropout": 0.5}}',)
TOML_ARCHITECTURES = (b'name = "n"\n[defaults]\nframes = 8\nsteps = [10, 5]\n[unet]\nhead_dim = 32\n',)

KINDS = (
    Kind("clip.txt", CAPTIONS, SettingsError, check_caption),
    Kind("list.csv", CSVS, SettingsError, check_csv),
    Kind("list.jsonl", JSONLS, SettingsError, check_jsonl),
    Kind("train.toml", SETTINGS, SettingsError, check_settings),
    Kind("profile.toml", PROFILES, RequestError, check_profile),
    Kind("architecture.json", JSON_ARCHITECTURES, SettingsError, check_architecture),
    Kind("architecture.toml", TOML_ARCHITECTURES, SettingsError, check_architecture),
    Kind("a.pth", (saved(STATE), saved({"state_dict": STATE})), CheckpointError, check_archive),
    Kind("b.ckpt", (saved(STATE, True), saved({"model": STATE}, True)), CheckpointError, check_plain),
    Kind("c.safetensors", (as_safetensors(STATE),), CheckpointError, check_plain),
)
MANIFEST = Bundle.open(default_model()).manifest
CONFIG = spec.config(MANIFEST)

PIECES = (
    *(b"\0", b"\xff", b'"', b'""', b",", b";", b"\n", b"\r\n", b"\r", b"\t", b" ", b"\\", b"[", b"{", b"}", b"]", b"="),
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        b"-1",
        b"1e999",
        b"nan",
        b"null",
        b"#",
        b"a.mp4,",
    ),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to three changes: flip a bit, insert, overwrite, delete or double a part, cut an end off, or re-encode."""
    for _ in range(draw.randint(1, 3)):
        at, size = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 8, 40))
        # Half of the changes hit the first bytes, where headers are.
        at = min(at, draw.randrange(64)) if draw.random() < 0.5 else at
        way = draw.randrange(8)
        if way == 0 and data:
            place = min(at, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        elif way == 1:
            data = data[:at] + draw.choice(PIECES) + data[at:]
        elif way == 2:
            piece = draw.choice(PIECES)
            data = data[:at] + piece + data[at + len(piece) :]
        elif way == 3:
            data = data[:at] + data[at + size :]
        elif way == 4:
            data = data[:at] + data[at : at + size] + data[at:]
        elif way == 5:
            data = data[: draw.randrange(len(data) + 1)]
        elif way == 6:
            data = data[:at] + bytes(draw.randrange(256) for _ in range(size)) + data[at:]
        elif draw.random() < 0.2:
            try:
                data = data.decode().encode(draw.choice(("utf-16", "utf-16-le", "utf-32", "cp1252", "shift_jis")))
            except UnicodeError:
                continue
    return data


def run(kind: Kind, data: bytes, folder: Path) -> str:
    """The outcome for this file: "read" or "refused". An error of a wrong type passes through."""
    file = folder / kind.name
    file.write_bytes(data)
    if kind.name == "clip.txt":
        (folder / "clip.mp4").write_bytes(b"x")
    try:
        kind.check(file, data)
    except kind.error as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of several lines: {error}") from error
        return "refused"
    return "read"


def campaign(count: int, seed: int = 0, folder: Path | None = None) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts of (kind, outcome) over `count` files, and the failures."""
    draw, found, failures = random.Random(seed), Counter[tuple[str, str]](), list[str]()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            data = mutated(draw.choice(kind.examples), draw)
            place = Path(scratch, kind.name.replace(".", "-"))
            place.mkdir(exist_ok=True)
            before = signal.setitimer(signal.ITIMER_REAL, SECONDS) if hasattr(signal, "setitimer") else None
            try:
                found[kind.name, run(kind, data, place)] += 1
            except Exception as error:
                found[kind.name, "FAILED"] += 1
                failures.append(f"{number} {kind.name}: {type(error).__name__}: {str(error)[:300]}\n    {data[:120]!r}")
            finally:
                if before is not None:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    return found, failures


def stopped(*_: Any) -> None:
    raise TimeoutError("it hangs")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, stopped)
    counted, wrong = campaign(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for (name, outcome), times in sorted(counted.items()):
        print(f"{name:<20} {outcome:<8} {times}")
    print("\n".join(wrong[:40]))
    print(f"{sum(counted.values())} files, {len(wrong)} failures")
    sys.exit(bool(wrong))
