"""A fixed sample of the campaign of tests/mutated_media.py: no crash, no hang, nothing but clips and typed errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from mutated_media import mutated, originals, outcome

SAMPLE = 12
"""Mutated files of each kind."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return originals(tmp_path_factory.mktemp("originals"))


def test_the_originals_are_read(files: list[Path]) -> None:
    assert {path.name: outcome(path) for path in files} == {path.name: "read" for path in files}
    assert len({path.suffix for path in files}) == 14


def test_mutated_files_are_read_or_refused(tmp_path: Path, files: list[Path]) -> None:
    found = {}
    for kind, original in enumerate(files):
        data = original.read_bytes()
        for number in range(SAMPLE):
            path = tmp_path / f"mutated_{number}_{original.suffix}"
            path.write_bytes(mutated(data, np.random.default_rng([7, kind, number])))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's warnings about large or odd pictures
                found[original.name, number] = outcome(path)
    assert {key: what for key, what in found.items() if what not in ("read", "refused")} == {}
    assert set(found.values()) == {"read", "refused"}
