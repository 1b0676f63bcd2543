"""A fixed sample of the campaign of tests/fuzz_inputs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_inputs import KINDS, Kind, campaign, fields, run


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_examples_themselves_are_read(kind: Kind, tmp_path: Path) -> None:
    assert [run(kind, data, tmp_path) for data in kind.examples] == ["read"] * len(kind.examples)


def test_mutated_files_are_read_as_they_say_or_are_one_error(tmp_path: Path) -> None:
    found, failures = campaign(300, seed=13, folder=tmp_path)
    assert failures == []
    assert {name for name, outcome in found if outcome == "refused"} == {kind.name for kind in KINDS}


def test_the_independent_reader_of_csv_reads_csv() -> None:
    text = 'a,"b, ""c""\nd"\n,\n\n"x"'
    assert list(fields(text)) == [["a", 'b, "c"\nd'], ["", ""], [""], ["x"]]
    for wrong in ('"a', '"a"b\n'):
        with pytest.raises(ValueError, match="quote"):
            list(fields(wrong))
