"""The cache of recent results, and what a pipeline keeps in it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from higen.backends.base import RecordingBackend
from higen.backends.options import Options
from higen.backends.torch import TorchBackend
from higen.bounded_cache import BoundedCache
from higen.bundle import Bundle
from higen.pipeline import KEPT, Pipeline


def test_the_least_recently_used_goes_first() -> None:
    recent: BoundedCache[str] = BoundedCache(2)
    made: list[str] = []

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"]
    assert made == ["a", "b"]
    get("a")
    get("c")  # b is dropped
    assert [get(key) for key in "acb"] == ["A", "C", "B"]
    assert made == ["a", "b", "c", "b"]
    assert len(recent) == 2
    recent.clear()
    assert len(recent) == 0


def test_a_failure_is_not_kept() -> None:
    recent: BoundedCache[int] = BoundedCache(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 1) == 1


def test_threads_do_not_wait_for_each_other() -> None:
    recent: BoundedCache[int] = BoundedCache(8)
    both = threading.Barrier(2, timeout=30)  # passes only if two threads make their values at the same time
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda key: recent.get(key, lambda: both.wait() and 0), "ab"))
    assert made == [0, 0]
    assert len(recent) == 2


def test_a_prompt_is_encoded_once_and_bounded(tiny_model: Path) -> None:
    bundle = Bundle.open(tiny_model)
    backend = RecordingBackend(bundle.manifest)
    pipeline = Pipeline(bundle, backend)

    def calls(prompt: str | list[str], **options: float) -> list[str]:
        backend.calls.clear()
        pipeline(prompt, steps=1, frames=2, progress=False, **options)
        return [stage for stage, _ in backend.calls if stage in ("text_encoder", "conditioner")]

    one, both = ["text_encoder", "conditioner"], ["conditioner"] * 2
    assert calls("a whale") == one * 2 + both
    assert calls("a whale", seed=3) == []
    assert calls(["a whale", "a star", "a star"]) == [*one, "conditioner"]
    assert calls("a whale", motion=20) == both  # other cues, the same text
    other = Pipeline(bundle, RecordingBackend(bundle.manifest))
    other("a whale", steps=1, frames=2)
    assert "text_encoder" in [stage for stage, _ in other.backend.calls]  # type: ignore[attr-defined]
    for seed in range(2):
        for motion in range(KEPT):
            calls("a whale", motion=motion + 1, seed=seed)
    assert len(pipeline._kept) == KEPT
    pipeline.close()
    assert len(pipeline._kept) == 0


def test_what_is_kept_changes_no_video(tiny_model: Path) -> None:
    bundle = Bundle.open(tiny_model)
    with Pipeline(bundle, TorchBackend(bundle, Options(device="cpu"))) as pipeline:
        first = pipeline("a whale", seed=1, negative_prompt="a star")
        pipeline(["a star", "a blue heart"], seed=2)
        np.testing.assert_array_equal(pipeline("a whale", seed=1, negative_prompt="a star").frames, first.frames)
