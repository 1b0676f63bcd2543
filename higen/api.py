"""`higen.load` and `higen.generate`."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, overload

from higen.backends.options import Options
from higen.backends.select import check_backend, select_backend
from higen.bundle import Bundle, default_model
from higen.memory import enough_memory
from higen.pipeline import Pipeline, Prompts
from higen.progress import Shown
from higen.video import Video

__all__ = ["default_model", "generate", "load"]


def load(
    model: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    *,
    device: Any = None,
    precision: str | None = None,
    threads: int | None = None,
    verify: bool | None = None,
    low_memory: bool | None = None,
    prepare: bool | None = None,
) -> Pipeline:
    """Load a model directory, by default the small model inside the package. None means an option's default.

    backend    "auto" (the best that works here, the default) or a backend's name
    device     "cpu", "cuda", "cuda:1", ... or a torch.device; None or "auto": a working GPU if there is one
    precision  what the stages compute in: "fp32", "fp16", "bf16", or a quantised precision such as "int8", which only
               the denoiser has; None: on a CPU fp32; on a GPU fp16 if the model has fp16 graphs, else the precision
               that the weights are stored in
    threads    CPU threads of one stage; None: the library's choice
    verify     check the sha256 of each file as it is loaded (default True)
    low_memory one TensorRT engine on the GPU at a time, for cards that cannot hold all of them (default False)
    prepare    load now what a default request needs; if False, each stage is loaded at its first use (default True)

    A pipeline can be pickled: the process that receives it loads the model again with the same options. A forked
    process cannot use its parent's pipeline. Raises RequestError, ManifestError, IntegrityError, BackendUnavailable,
    OutOfMemory or EngineError.
    """
    backend = check_backend(backend)
    options = Options(device, precision, threads, verify, low_memory)  # type: ignore[arg-type] # None is the default
    with enough_memory("load"):
        bundle = Bundle.open(default_model() if model is None else model)
        pipeline = Pipeline(bundle, select_backend(bundle, backend, options))
        try:
            if prepare is None or prepare:
                pipeline.prepare()
        except BaseException:
            pipeline.close()
            raise
    return pipeline


@lru_cache(maxsize=1)
def _default_pipeline(backend: str, process: int) -> Pipeline:
    """The built-in model, loaded once in each process."""
    return load(backend=backend)


@overload
def generate(prompt: str, *, backend: str | None = None, progress: Shown = None, **options: Any) -> Video: ...


@overload
def generate(prompt: Prompts, *, backend: str | None = None, progress: Shown = None, **options: Any) -> list[Video]: ...


def generate(
    prompt: str | Prompts, *, backend: str | None = None, progress: Shown = None, **options: Any
) -> Video | list[Video]:
    """Make a video with the small model inside the package, without a download. Options as for `Pipeline.__call__`.

        higen.generate("a whale flapping its tail on a blue sky", seed=7).save("whale.mp4")

    The model is loaded once and kept. A list of prompts gives a list of videos.
    """
    name = check_backend(backend)
    return _default_pipeline(name, os.getpid())(prompt, progress=progress, **options)
