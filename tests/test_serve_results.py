"""Finished videos in a folder, read by many threads at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="higen[serve] is not installed")

from higen.serve.results import Results
from higen.video import Video


def test_two_threads_never_parse_a_header_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy reads headers with Python's parser, which fails when two threads use it at once (python/cpython#106905)."""
    results = Results(tmp_path)
    names = [f"video_{number:032x}" for number in range(4)]
    for name in names:
        results.save(name, Video(np.zeros((2, 16, 16, 3), np.uint8), 8))
    inside, load = threading.Lock(), np.load

    def alone(*given: Any, **options: Any) -> Any:
        assert inside.acquire(blocking=False)
        try:
            time.sleep(0.02)
            return load(*given, **options)
        finally:
            inside.release()

    monkeypatch.setattr(np, "load", alone)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda name: results.file(name, "thumbnail", 8.0, {}, lambda size: None), names))
    assert all(path.is_file() for path, _ in made)
