"""`higen.load` and `higen.generate`."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, overload

from higen.backends.options import Options
from higen.backends.select import check_backend, select_backend
from higen.bundle import Bundle, default_model
from higen.pipeline import Pipeline, Prompts
from higen.video import Video

__all__ = ["default_model", "generate", "load"]


def load(
    model: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    *,
    device: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    low_memory: bool = False,
    prepare: bool = True,
) -> Pipeline:
    """Load a model directory; without one, the small model inside the package.

    backend    "auto" (the best that works here) or a backend's name
    device     "cpu", "cuda", and for torch "cuda:1", ...; None: a GPU if there is one that works
    precision  "fp32", "fp16", "bf16", or a quantised one such as "int8", which the denoiser has and the other stages
               have not: what the stages compute in; None: fp32 on a CPU, on a GPU fp16 where the model has such
               graphs, else what the weights are stored in
    threads    CPU threads of one stage; None: the library's choice
    verify     check the sha256 of each file as it is loaded
    low_memory one TensorRT engine on the GPU at a time, for cards that do not hold all
    prepare    load now what a default request needs; else each stage is loaded when a request first needs it

    Raises RequestError, ManifestError, IntegrityError, BackendUnavailable or EngineError.
    """
    check_backend(backend)
    options = Options(device, precision, threads, verify, low_memory)
    bundle = Bundle.open(default_model() if model is None else model)
    pipeline = Pipeline(bundle, select_backend(bundle, backend, options))
    try:
        if prepare:
            pipeline.prepare()
    except BaseException:
        pipeline.close()
        raise
    return pipeline


@lru_cache(maxsize=1)
def _default_pipeline(backend: str) -> Pipeline:
    return load(backend=backend)


@overload
def generate(prompt: str, *, backend: str = "auto", progress: bool | None = None, **options: Any) -> Video: ...


@overload
def generate(
    prompt: Prompts, *, backend: str = "auto", progress: bool | None = None, **options: Any
) -> list[Video]: ...


def generate(
    prompt: str | Prompts, *, backend: str = "auto", progress: bool | None = None, **options: Any
) -> Video | list[Video]:
    """Make a video with the small model inside the package: no download. Options as for `Pipeline.__call__`.

        higen.generate("a whale flapping its tail on a blue sky", seed=7).save("whale.mp4")

    The model is loaded once and kept. A list of prompts gives a list of videos.
    """
    return _default_pipeline(check_backend(backend))(prompt, progress=progress, **options)
