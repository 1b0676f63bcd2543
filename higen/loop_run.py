"""Runs one loop of a request: from noise, from a picture or clip with noise added, or from an inverted one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import Backend
from higen.chunk_runner import ChunkRunner
from higen.known_frames import spread
from higen.manifest import Manifest
from higen.request import Request, inverse_rows
from higen.sampler import Plan, Runner, Step, denoise, initial_state, repeated, tail
from higen.schedule import last_level, solver_table
from higen.sources import Sources
from higen.stages import Stage
from higen.tables import Loop

__all__ = ["conditions_of", "first_row", "rows_of", "run_inverted", "run_loop"]


def first_row(request: Request, loop: Loop, rows: int) -> int:
    """The first row that a loop runs, of a table with this many rows."""
    return tail(rows, request.number(loop.start.strength)) if loop.start and request.begins(loop) else 0


def conditions_of(sources: Sources, loop: Loop) -> Callable[[Stage], Mapping[str, Any]]:
    """Gives the inputs of a stage in this loop, without its state. They are made once."""
    made: dict[str, Mapping[str, Any]] = {}

    def conditions(stage: Stage) -> Mapping[str, Any]:
        if stage.name not in made:
            made[stage.name] = sources.batch(stage, loop)
        return made[stage.name]

    return conditions


def rows_of(manifest: Manifest, request: Request, loop: Loop) -> int:
    """The number of rows that a loop runs, in all its passes."""
    i = manifest.loops.index(loop)
    rows = len(solver_table(loop.schedule, loop.prediction, loop.solver(request.solvers[i]), request.steps[i]))
    again, up = request.settings.repeats(loop), inverse_rows(manifest, request, loop) if request.inverts(loop) else ()
    return (rows - first_row(request, loop, rows)) * (again.iterations if again else 1) + len(up)


def run_loop(
    manifest: Manifest, backend: Backend, request: Request, sources: Sources, loop: Loop, plan: Plan
) -> Iterator[Step]:
    """The steps of a loop that begins from noise, or from a picture or clip with noise added (SDEdit, image to
    image).
    """
    runner = _runner(manifest, backend, sources)
    if (again := request.settings.repeats(loop)) is not None:
        yield from repeated(runner, plan, partial(sources.initial_noise, loop), last_level(loop.schedule), again)
        return
    clean = sources.made(loop.start.latents, loop) if loop.start and request.begins(loop) else None
    unit, added = sources.initial_noise(loop)
    yield from denoise(runner, plan, initial_state(plan.table, unit, added, clean, plan.first))


def run_inverted(
    manifest: Manifest,
    backend: Backend,
    request: Request,
    sources: Sources,
    loop: Loop,
    plan: Plan,
    sources_of: Callable[[Request], Sources],
) -> Iterator[Step]:
    """The steps of a loop that begins from an inverted picture or clip (Song et al. 2021, section 4.3).

    Its latents are carried up the noise levels with the text of the inversion and without guidance; then `plan` is run.
    While they are carried up, no frames are known, and an earlier loop of one frame (the key frame) has the middle
    frame of the clip as its result.
    """
    assert loop.start is not None
    clean = spread(sources.made(loop.start.latents, loop), request.frames_of(loop))
    described = sources_of(_described(manifest, request))
    for earlier in manifest.wanted(request.frames):
        if earlier == loop:
            break
        if earlier.frames == 1:
            described.finish(earlier, clean[:, :, clean.shape[2] // 2, None])
        elif request.runs(earlier) or request.replaces(earlier):
            described.finish(earlier, sources.latents(earlier.name))
    table = inverse_rows(manifest, request, loop)
    ones = np.ones((len(table), *plan.guidance.shape[1:]), np.float32)
    conditions = conditions_of(described, loop)
    up = replace(plan, conditions=conditions, table=table, guidance=ones, first=0, edit=None, stretch=None)
    total, noisy = len(table) + len(plan.table) - plan.first, clean
    for step in denoise(_runner(manifest, backend, described), up, clean):
        noisy = step.latents
        yield replace(step, total=total)
    for step in denoise(_runner(manifest, backend, sources), plan, _numpy(backend, noisy)):
        yield replace(step, index=len(table) + step.index, total=total)


def _described(manifest: Manifest, request: Request) -> Request:
    """The request for the way up: its prompts are the text of the inversion, and it has no known frames."""
    text = request.settings.inversion
    assert text is not None
    known = [name for one in manifest.loops if one.known for name in (one.known.control, one.known.mask) if name]
    return replace(
        request,
        prompts=(text,) * len(request.prompts),
        controls={**request.controls, **dict.fromkeys(known)},
        settings=replace(request.settings, inversion=None),
        warn=lambda _: None,
    )


def _runner(manifest: Manifest, backend: Backend, sources: Sources) -> Runner:
    return ChunkRunner.over(backend, manifest, [sources.chunks(i) for i in range(sources.samples)])


def _numpy(backend: Backend, latents: Any) -> NDArray[np.float32]:
    return np.asarray(backend.to_numpy(latents), np.float32)
