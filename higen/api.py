"""`higen.load` and `higen.generate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from higen.backends.select import check_backend, select_backend
from higen.bundle import Bundle
from higen.pipeline import Pipeline

__all__ = ["default_model", "generate", "load"]


def default_model() -> Path:
    """The directory of the small model inside the package."""
    return Path(str(files("higen"))) / "assets" / "default"


def load(
    model: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    device: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
) -> Pipeline:
    """Load a model directory; without one, the small model inside the package.

    backend  "auto" (the best that works here) or a backend's name
    device   where torch runs: "cpu", "cuda", "cuda:1", ...; None: a GPU if there is one
    dtype    "float32", "float16" or "bfloat16"; None: float32 on a CPU, as stored elsewhere
    verify   check the sha256 of each file as it is loaded

    Raises RequestError, ManifestError, IntegrityError or BackendUnavailable.
    """
    check_backend(backend)
    bundle = Bundle.open(default_model() if model is None else model)
    pipeline = Pipeline(bundle, select_backend(bundle, backend, device=device, dtype=dtype, verify=verify))
    pipeline.prepare()
    return pipeline


@lru_cache(maxsize=1)
def _default_pipeline(backend: str) -> Pipeline:
    return load(backend=backend)


def generate(prompt: str | Sequence[str], *, backend: str = "auto", **options: Any) -> Any:
    """Make a video with the small model inside the package: no download. Options as for `Pipeline.__call__`.

        higen.generate("a whale flapping its tail on a blue sky", seed=7).save("whale.mp4")

    The model is loaded once and kept. A list of prompts gives a list of videos.
    """
    return _default_pipeline(check_backend(backend))(prompt, **options)
