"""Text files as editors and spreadsheets write them: read as meant, or refused with the line number and advice."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from higen.api import default_model
from higen.bundle import Bundle
from higen.engines.shapes import read_profile
from higen.errors import FixtureError, RequestError, SettingsError
from higen.families.higen import spec
from higen.parity import fixtures
from higen.text_files import TextError, check_text, plain_text, read_json, read_text, read_toml
from higen.train.data import list_items
from higen.train.networks import read_architecture
from higen.train.settings import read_settings

MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    def put(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(MARK + text.encode())
        return tmp_path / name

    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (clips / name).write_bytes(b"x")
    put("clips/a.txt", "a whale")
    put("clips/b.caption", "a crab")
    assert [item.caption for item in list_items(clips).items] == ["a whale", "a crab"]
    assert list_items(put("l.csv", "path,caption\na.mp4,a whale\n")).items[0].caption == "a whale"
    assert list_items(put("l.jsonl", '{"path": "a.mp4", "caption": "a whale"}')).items[0].caption == "a whale"
    run = '[model]\ninit = "m"\n[data]\npath = "c"\n[run]\noutput = "o"\nsteps = 1\n'
    assert read_settings(put("t.toml", run)).run.steps == 1
    manifest = Bundle.open(default_model()).manifest
    profile = "batch = 1\nframes = 'default'\nheight = 128\nwidth = 128\nimages = 2\n"
    assert read_profile(str(put("p.toml", profile)), manifest).name == "p"
    config = spec.config(manifest)
    assert read_architecture(put("a.json", '{"name": "n"}'), config).name == "n"
    assert read_architecture(put("b.toml", 'name = "n"'), config).name == "n"
    assert fixtures.read_json(put("f.json", '{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (MARK + MARK + b"twice", "twice"),
        ("é \U0001f40b\n".encode(), "é \U0001f40b\n"),
        (b"", ""),
        (MARK, ""),
        (b"tab\tand form\x0cfeed", "tab\tand form\x0cfeed"),
    ],
)
def test_what_can_be_read_in_one_way_only_is_read(data: bytes, text: str) -> None:
    assert plain_text(data) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a whale".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("a whale".encode("utf-16-le"), "UTF-16: save it as UTF-8"),
        ("a whale".encode("utf-16-be"), "UTF-16: save it as UTF-8"),
        ("one\nc\u0153ur".encode("cp1252"), "line 2: not UTF-8 (byte 0x9c): save it as UTF-8"),
        (b"one\ntwo\x00three", "line 2: the character U+0000 is not allowed: remove it"),
        (b"\x1b[31mred", "line 1: the character U+001B is not allowed: remove it"),
        (b"one\n" + MARK + b"two", "line 2: a byte order mark within the text is not allowed: remove it"),
        (b"\xed\xa0\x80", "line 1: not UTF-8 (byte 0xed): save it as UTF-8"),
        (bytes(4), "line 1: the character U+0000 is not allowed: remove it"),
    ],
)
def test_bytes_that_are_not_text_are_named_with_their_line(data: bytes, message: str) -> None:
    with pytest.raises(TextError) as caught:
        plain_text(data)
    assert str(caught.value) == message


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufeff")))
def test_every_plain_text_comes_back(text: str) -> None:
    assert plain_text(MARK + text.encode()) == text
    check_text(text)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_text_or_one_error(data: bytes) -> None:
    try:
        text = plain_text(data)
    except TextError as error:
        said = str(error)
    else:
        said = ""
        assert text.encode() in data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert "\n" not in said


def test_a_limit_and_other_things_than_files(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 11)
    with pytest.raises(TextError, match="11 bytes: at most 10"):
        read_text(tmp_path / "long.txt", largest=10)
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match="not a regular file"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_invalid_json_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(TextError, match=message):
        read_json(tmp_path / "x.json")
    with pytest.raises(FixtureError, match=message):
        fixtures.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "a = " + "[" * 5000, "a = 1e"])
def test_invalid_toml_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(TextError, match="not valid TOML"):
        read_toml(tmp_path / "x.toml")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(tmp_path / "x.toml")
    with pytest.raises(RequestError, match="not valid TOML"):
        read_profile(str(tmp_path / "x.toml"), Bundle.open(default_model()).manifest)


@given(st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), st.integers(-9, 9) | st.booleans()))
def test_toml_is_read_as_its_library_reads_it(table: dict[str, int]) -> None:
    text = "".join(f"{name} = {json.dumps(value)}\r\n" for name, value in table.items())
    assert tomllib.loads(plain_text(text.encode())) == tomllib.loads(text)
