"""Checks the references between a manifest's tables. Each error names the row and what is allowed."""

from __future__ import annotations

import graphlib
import reprlib
from collections.abc import Iterator, Mapping

from higen.decoder_references import check_decoders
from higen.errors import ManifestError
from higen.frame_references import check_frames_source, check_known_source, check_placed, of_kind
from higen.preset_references import check_presets
from higen.rows import Rows
from higen.stages import DEEP, STATE, STEP_COLUMNS, TOKENS, Output, Stage, Tensor, source
from higen.tables import MAX_NUMBER, MAX_SIZE, NUMERIC, Loop, check, is_number

__all__ = ["check_references", "needs"]

PIXELS_AND_LATENTS: dict[int | str, str] = {"H": "Y", "W": "X", "Y": "H", "X": "W"}
"""Pairs of pixel and latent axes; their sizes differ by `sizes.factor`."""

MOST_COLUMNS = 2**16
"""The most columns of an encoded curve."""

MAX_DEEP = 2**16
"""The most channels of deep features."""

MOST_ROWS = 100
"""The most rows of the tables of stages and of loops, far more than any model has."""


def check_references(manifest: Rows) -> None:
    """Raise ManifestError for a name that is used twice, and for a reference to something that does not exist."""
    stages, loops = manifest.stage_names, tuple(loop.name for loop in manifest.loops)
    controls = tuple(control.name for control in manifest.controls)
    rows = tuple(stage.name for stage in manifest.all_stages)
    for table, names in (("stages", (*rows, *loops)), ("controls", controls)):
        twice = sorted({name for name in names if names.count(name) > 1})
        check(not twice, f"{table}: {', '.join(twice)} appears twice (names of loops and stages must differ)")
    good = 1 <= len(stages) <= MOST_ROWS and 1 <= len(loops) <= MOST_ROWS
    check(good, f"stages, loops: from 1 to {MOST_ROWS} rows each, not {len(stages)} and {len(loops)}")
    check(
        TOKENS not in {*manifest.free} & {*manifest.fixed},
        f"sizes.symbols.{TOKENS}: cannot be fixed together with text.chunks",
    )
    for stage in manifest.stages:
        _check_stage(manifest, stage)
    _check_circles(manifest)
    for i, loop in enumerate(manifest.loops):
        _check_loop(manifest, loop, loops[:i])
    check_decoders(manifest)
    _check_result(manifest)
    check_presets(manifest)


def _check_stage(manifest: Rows, stage: Stage) -> None:
    where = f"stages.{stage.name}"
    check(stage.name.isidentifier() and stage.name.isascii(), f"{where}: letters, digits and _")
    check(bool(stage.inputs) and bool(stage.outputs), f"{where}: at least one input and one output")
    for row in ([t.name for t in stage.inputs], [t.name for t in stage.outputs]):
        check(len(set(row)) == len(row), f"{where}: {row} names a tensor twice")
    tensors: tuple[Tensor | Output, ...] = (*stage.inputs, *stage.outputs)
    for tensor in tensors:
        check(bool(tensor.shape), f"{where}.{tensor.name}: at least one axis")
        for n in tensor.shape:
            free = manifest.free
            known = 1 <= n <= MAX_SIZE if isinstance(n, int) else n in free or n in manifest.fixed
            check(known, f"{where}.{tensor.name}: {n!r}: a size, one of {', '.join(free)}, or a name in sizes.symbols")
    inner = {n for tensor in stage.inputs for n in tensor.shape}
    inner |= {PIXELS_AND_LATENTS[n] for n in inner & PIXELS_AND_LATENTS.keys()}
    for made in stage.outputs:
        unknown = [n for n in made.shape if n in manifest.free and n not in inner]
        check(not unknown, f"{where}.{made.name}: {', '.join(map(str, unknown))} is not an axis of any of its inputs")
    firsts = {tensor.shape[0] if tensor.shape else 1 for tensor in tensors}
    joined = firsts in ({"B"}, {"N"})
    check(joined or not stage.batch, f"{where}: batch is true, but the first axes are not all B, or all N")
    if stage.deep is not None:
        check(bool(stage.variants), f"{where}.deep={stage.deep}: only for a denoising stage")
        check(1 <= stage.deep <= MAX_DEEP, f"{where}.deep={stage.deep}: a whole number from 1 to {MAX_DEEP}")
    for tensor in stage.inputs:
        _check_source(manifest, f"{where}.{tensor.name}", tensor)
    if manifest.text is not None and not manifest.text.plain:
        _check_chunks(manifest, stage, manifest.text.length)


def _check_chunks(manifest: Rows, stage: Stage, length: int) -> None:
    """For models with chunks or weights: a stage that reads a text gives [B, L, D], and its takers declare [B, T, D].

    T, the tokens of all chunks in order, is allowed only as the second of three axes.
    """
    where, chunked = f"stages.{stage.name}", TOKENS in manifest.free
    texts = [tensor.name for tensor in stage.inputs if source(tensor.source).kind == "text"]
    check(
        len(texts) < 2, f"{where}: reads {', '.join(texts)}, but text.weights and text.chunks allow one text per stage"
    )
    for made in stage.outputs if texts else ():
        good = len(made.shape) == 3 and _size(manifest, made.shape[1]) == length
        check(
            good,
            f"{where}.{made.name}: with text.weights or text.chunks the shape is [B, {length}, D], not "
            f"{list(made.shape)}",
        )
    for tensor in stage.inputs if chunked else ():
        origin = source(tensor.source)
        of_chunks = origin.kind == "made" and TOKENS in _joined_shape(manifest, origin.name, origin.output)
        good = (len(tensor.shape) == 3 and tensor.shape[1] == TOKENS) if of_chunks else TOKENS not in tensor.shape
        shape = (
            "[B, T, D] for the chunks of a text"
            if of_chunks
            else f"no axis {TOKENS}, because it does not take the chunks of a text"
        )
        check(good and tensor.shape.count(TOKENS) <= 1, f"{where}.{tensor.name}: {shape}, not {list(tensor.shape)}")


def _joined_shape(manifest: Rows, name: str, output: str) -> tuple[int | str, ...]:
    """The shape of a stage's output for all chunks of a text; empty if the output comes from a loop."""
    rows = [stage for stage in manifest.stages if stage.name == name]
    shapes = [made.shape for stage in rows for made in stage.outputs if made.name == output]
    if rows and shapes and any(source(tensor.source).kind == "text" for tensor in rows[0].inputs):
        return (shapes[0][0], TOKENS, *shapes[0][2:])
    return shapes[0] if shapes else ()


def _check_source(manifest: Rows, where: str, tensor: Tensor) -> None:
    try:
        found = source(tensor.source)
    except ManifestError as error:
        raise ManifestError(f"{where}: {error}") from None
    if found.kind == "text":
        check(manifest.text is not None, f"{where}: source {tensor.source}, but text is null")
        check(tensor.dtype == "int64", f"{where}: tokens are int64")
        wanted = manifest.text.length if manifest.text is not None else 0
        good = len(tensor.shape) == 2 and _size(manifest, tensor.shape[1]) == wanted
        check(good, f"{where}: tokens are [B, {wanted}], not {list(tensor.shape)}")
    elif found.kind in ("control", "picture", "clip"):
        _check_control_source(manifest, where, tensor)
    elif found.kind in ("frames", "places"):
        check_frames_source(manifest, where, tensor)
    elif found.kind == "known":
        check_known_source(where, tensor)
    elif found.shown:
        _check_shown(manifest, where, tensor)
    elif found.kind == "made":
        _check_made(manifest, where, tensor.source, len(tensor.shape))
        check_placed(manifest, where, tensor)


def _size(manifest: Rows, axis: int | str) -> int | None:
    """The size of an axis that the model fixes; None for a free axis."""
    return axis if isinstance(axis, int) else manifest.fixed.get(axis)


def _check_control_source(manifest: Rows, where: str, tensor: Tensor) -> None:
    found = source(tensor.source)
    if found.kind == "control" and found.name == "fps":
        return
    fitting = {"picture": ("picture",), "clip": ("clip", "map"), "control": (*NUMERIC, "choice")}[found.kind]
    names = [control.name for control in manifest.controls if control.kind in fitting]
    check(found.name in names, f"{where}: source {tensor.source}: the controls of this kind are {names}")
    shape = list(tensor.shape)
    if found.kind != "control":
        ranks = (4, 5) if found.kind == "clip" else (4,)
        check(len(shape) in ranks, f"{where}: source {tensor.source}: {' or '.join(map(str, ranks))} axes, not {shape}")
        return
    encoding = str(manifest.control(found.name).encoding)
    rank = {"number": 1, "curve": 2, "sinusoid": 3, "similarity": 3}[encoding]
    check(len(shape) == rank, f"{where}: {encoding} gives {rank} axes, not {shape}")
    columns = _size(manifest, tensor.shape[-1])
    good = rank < 3 or (columns is not None and columns <= MOST_COLUMNS)
    check(good, f"{where}: {encoding} needs a last axis of a fixed size of at most {MOST_COLUMNS}, not {shape[-1]!r}")


def _check_shown(manifest: Rows, where: str, tensor: Tensor) -> None:
    """Check an input that takes the pixels made by a stage as a picture."""
    found = source(tensor.source)
    check(len(tensor.shape) == 4, f"{where}: source {tensor.source}: 4 axes, not {list(tensor.shape)}")
    check(found.name in manifest.stage_names, f"{where}: source {tensor.source}: the stages are {manifest.stage_names}")
    outputs = {made.name: made.shape for made in manifest.stage(found.name).outputs}
    check(found.output in outputs, f"{where}: source {tensor.source}: {found.name} gives {', '.join(outputs)}")
    made = outputs[found.output]
    good = len(made) in (4, 5) and (_size(manifest, made[1]), made[-2:]) == (3, ("Y", "X"))
    check(good, f"{where}: source {tensor.source}: [N, 3, Y, X] or [B, 3, F, Y, X] is wanted, not {list(made)}")


def _check_given(manifest: Rows, where: str, text: str, kinds: tuple[str, ...]) -> None:
    """Check a stage that gets a control's frames instead of its picture or clip; the frames are its axis N."""
    found = source(text)
    names = of_kind(manifest, *kinds)
    check(found.given in names, f"{where}: source {text}: the controls of kind {' or '.join(kinds)} are {names}")
    inputs = [t for stage in manifest.stages if stage.name == found.name for t in stage.inputs]
    pixels = [t for t in inputs if source(t.source).kind in ("picture", "clip") or source(t.source).shown]
    good = len(pixels) == 1 and pixels[0].shape[0] == "N" and pixels[0].shape[-2:] == ("Y", "X")
    check(good, f"{where}: source {text}: {found.name} takes no pixels [N, 3, Y, X] of a picture or clip")


def _check_made(manifest: Rows, where: str, text: str, rank: int) -> None:
    found = source(text)
    if found.given:
        _check_given(manifest, where, text, ("picture", "clip", "frames"))
    check(found.kind == "made" and not found.shown, f"{where}: source {text}: STAGE.OUTPUT or LOOP.latents")
    if found.name in {loop.name for loop in manifest.loops}:
        check(found.output == "latents" and not found.negative, f"{where}: source {text}: a loop gives only latents")
        check(rank in (4, 5), f"{where}: source {text} has 4 or 5 axes, not {rank}")
        return
    names = manifest.stage_names
    check(found.name in names, f"{where}: source {text}: the stages are {', '.join(names)}")
    made = [t.name for t in manifest.stage(found.name).outputs]
    check(found.output in made, f"{where}: source {text}: {found.name} gives {', '.join(made)}")
    denoises = manifest.stage(found.name).denoises
    check(not denoises, f"{where}: source {text}: a denoising stage is run by its loop; take LOOP.latents")
    made_rank = next(len(t.shape) for t in manifest.stage(found.name).outputs if t.name == found.output)
    check(rank == made_rank or (made_rank, rank) == (4, 5), f"{where}: source {text} has {made_rank} axes, not {rank}")


def needs(manifest: Rows, name: str) -> Iterator[str]:
    """The stages and loops with outputs that a stage or loop takes."""
    loops = {loop.name: loop for loop in manifest.loops}
    if name in loops:
        loop = loops[name]
        texts = [row.latents for row in (loop.replaced, loop.start, loop.known) if row is not None]
        tensors = [t for stage in loop.stages if stage in manifest.stage_names for t in manifest.stage(stage).inputs]
        yield from (row.loop for row in (loop.noise.mix, loop.stretch) if row is not None)
    else:
        texts, tensors = [], list(manifest.stage(name).inputs)
    for text in (*texts, *(t.source for t in tensors)):
        found = source(text)
        if found.kind == "made":
            yield found.name


def _check_circles(manifest: Rows) -> None:
    rows = (*manifest.stage_names, *(loop.name for loop in manifest.loops))
    try:
        graphlib.TopologicalSorter({name: list(needs(manifest, name)) for name in rows}).prepare()
    except graphlib.CycleError as error:
        circle = " <- ".join(reversed(error.args[1]))
        raise ManifestError(f"stages: the sources form a circle: {circle}") from None


def _check_loop(manifest: Rows, loop: Loop, earlier: tuple[str, ...]) -> None:
    where = f"loops.{loop.name}"
    for key, name in _keyed_stages(loop):
        if name is None:
            continue
        check(name in manifest.stage_names, f"{where}.{key}={name!r}: the stages are {', '.join(manifest.stage_names)}")
        stage = manifest.stage(name)
        good = stage.denoises and all(made.name != DEEP for made in stage.outputs)
        check(good, f"{where}.{key}={name!r}: must give only {', '.join(STATE)}")
        check(
            stage.batch, f"{where}.{key}={name!r}: batch must be true, because a denoising stage takes several samples"
        )
        wanted = {*STATE, *STEP_COLUMNS} if key.endswith("guided") else {*STATE, *STEP_COLUMNS} - {"guidance"}
        state = {t.name for t in stage.inputs if t.source == "state"}
        check(state == wanted, f"{where}.{key}={name!r}: its state inputs must be {', '.join(sorted(wanted))}")
        _check_step(manifest, loop, stage, f"{where}.{key}={name!r}")
    needed = [source(t.source) for s in loop.stages for t in manifest.stage(s).inputs]
    later = {f.name for f in needed if f.kind == "made"} & {other.name for other in manifest.loops} - set(earlier)
    check(not later, f"{where}: needs the latents of {', '.join(sorted(later))}, which runs later")
    takes = [t.source for s in loop.stages for t in manifest.stage(s).inputs if source(t.source).kind == "known"]
    check(not takes or loop.known is not None, f"{where}.known=null: a stage of it takes {', '.join(takes)}")
    _check_known(manifest, loop, f"{where}.known")
    _check_variant(manifest, loop, f"{where}.variant")
    for key, verb, row in (
        ("noise.mix", "its noise is mixed with", loop.noise.mix),
        ("stretch", "its result is stretched from", loop.stretch),
    ):
        if row is None:
            continue
        check(row.loop in earlier, f"{where}.{key}.loop={row.loop!r}: an earlier loop")
        early = {other.name: other.least_frames for other in manifest.loops}[row.loop]
        _check_length(manifest, loop, f"{where}.{key}.loop", row.loop)
        check(
            early <= max(loop.least_frames, manifest.sizes.frames[0]),
            f"{where}: {verb} {row.loop}, but {row.loop} is left out for shorter clips",
        )
    _check_loop_controls(manifest, loop, where)


def _keyed_stages(loop: Loop) -> Iterator[tuple[str, str | None]]:
    """The keys of a loop that name the stages of its steps, with these stages."""
    for before, pair in zip(("", "variant."), loop.pairs, strict=False):
        yield from zip((f"{before}guided", f"{before}plain"), pair, strict=True)


def _check_variant(manifest: Rows, loop: Loop, where: str) -> None:
    """Check the variant of a loop: other stages that do its steps."""
    row = loop.variant
    if row is None:
        return
    names = of_kind(manifest, "map", "frames")
    check(row.control in names, f"{where}.control={row.control!r}: the controls of kind map or frames are {names}")
    for key in ("guided", "plain"):
        own, other = getattr(loop, key), getattr(row, key)
        check(
            (own is None) == (other is None),
            f"{where}.{key}={other!r}: null if and only if the loop's own {key} is null",
        )


def _check_known(manifest: Rows, loop: Loop, where: str) -> None:
    """Check the known frames of a loop."""
    row, kinds = loop.known, {control.name: control.kind for control in manifest.controls}
    if row is None:
        return
    good = loop.frames == "F" or manifest.sizes.frames[2] == 1
    check(good, f"{where}: {loop.name} has one frame, but a clip may have {manifest.sizes.frames[2]}")
    check(kinds.get(row.control) == "frames", f"{where}.control={row.control!r}: a control of kind frames")
    good = row.mask is None or kinds.get(row.mask) == "mask"
    check(good, f"{where}.mask={row.mask!r}: null, or a control of kind mask")
    found = source(row.latents)
    check(found.given == row.control, f"{where}.latents={row.latents!r}: STAGE@{row.control}.OUTPUT")
    _check_given(manifest, f"{where}.latents", row.latents, ("frames",))
    _check_made(manifest, f"{where}.latents", row.latents.replace(f"@{found.given}", ""), 5)


def _check_step(manifest: Rows, loop: Loop, stage: Stage, where: str) -> None:
    """Check the axes of a denoising stage: latents [B,C,f,H,W], columns [B], guidance [B,f], conditions [B, ...]."""
    shape = stage.input("latents").shape
    good = len(shape) == 5 and shape[0] == "B" and shape[2] in (loop.frames, "F") and shape[3:] == ("H", "W")
    good = good and _size(manifest, shape[1]) is not None
    check(good, f"{where}: latents are [B, C, {loop.frames}, H, W], C of a fixed size, not {list(shape)}")
    wanted: dict[str, tuple[int | str, ...]] = dict.fromkeys(STEP_COLUMNS, ("B",)) | dict.fromkeys(STATE, shape)
    wanted["guidance"] = ("B", shape[2])
    tensors: tuple[Tensor | Output, ...] = (*(t for t in stage.inputs if t.source == "state"), *stage.outputs)
    for tensor in tensors:
        good = tensor.dtype == "float32" and tensor.shape == wanted[tensor.name]
        check(good, f"{where}: {tensor.name} is float32 {list(wanted[tensor.name])}, not {list(tensor.shape)}")
    for tensor in stage.conditions:
        check(tensor.shape[0] == "B", f"{where}: the first axis of {tensor.name} is B, not {tensor.shape[0]!r}")


def _check_result(manifest: Rows) -> None:
    """Check for all lengths of a clip: the last loop that runs makes all frames, and no needed loop is left out."""
    fewest, _, most = manifest.sizes.frames
    least = {loop.name: loop.least_frames for loop in manifest.loops}
    for frames in sorted({fewest, min(max(fewest, 2), most), *(n for n in least.values() if fewest < n <= most)}):
        running = [loop for loop in manifest.loops if loop.least_frames <= frames]
        good = bool(running) and (frames == 1 or running[-1].frames == "F")
        check(good, f"loops: a clip of {frames} frames needs a last loop with frames 'F' and least_frames <= {frames}")
    for users, shortest in (
        *((loop.stages, max(loop.least_frames, fewest)) for loop in manifest.loops),
        ((manifest.sizes.decoder,), fewest),
    ):
        for name in (n for stage in manifest.feeding(*users) for n in needs(manifest, stage) if n in least):
            good = least[name] <= shortest
            check(good, f"loops.{name}: is left out for clips of {shortest} frames, but {users[0]} needs its latents")


def _check_length(manifest: Rows, loop: Loop, where: str, name: str) -> None:
    """Check that a loop of one frame does not take the latents of a loop over the clip's frames."""
    frames = {other.name: other.frames for other in manifest.loops}.get(name, 1)
    check(loop.frames != 1 or frames == 1, f"{where}={name!r}: has all frames of the clip, but {loop.name} has one")


def _check_loop_controls(manifest: Rows, loop: Loop, where: str) -> None:
    numeric = {control.name: control for control in manifest.controls if control.kind in NUMERIC}
    for name, value in loop.controls.items():
        check(name in numeric, f"{where}.controls.{name}: the controls with numbers are {[*numeric]}")
        control = numeric[name]
        good = is_number(value) and control.allows(value) and (control.kind != "whole" or value == int(value))
        check(good, f"{where}.controls.{name}={reprlib.repr(value)}: {control.range}")
    visual = [control.name for control in manifest.controls if control.kind in ("picture", "clip")]
    for key, row in (("replaced", loop.replaced), ("start", loop.start)):
        if row is not None:
            check(row.control in visual, f"{where}.{key}.control={row.control!r}: the pictures and clips are {visual}")
            given = source(row.latents).given
            check(given in ("", row.control), f"{where}.{key}.latents={row.latents!r}: @{given} is not {row.control}")
            _check_made(manifest, f"{where}.{key}.latents", row.latents, 5)
            _check_length(manifest, loop, f"{where}.{key}.latents", source(row.latents).name)
    scales: Mapping[str, float | str] = {
        **({"noise.offset.scale": loop.noise.offset.scale} if loop.noise.offset else {}),
        **({"noise.mix.scale": loop.noise.mix.scale} if loop.noise.mix else {}),
        **({"start.strength": loop.start.strength} if loop.start else {}),
    }
    numbers = [f"control:{control.name}" for control in manifest.controls if control.kind == "number"]
    for key, scale in scales.items():
        low, high = (0.0, 1.0) if key == "start.strength" else (-MAX_NUMBER, MAX_NUMBER)
        good = scale in numbers if isinstance(scale, str) else is_number(scale) and low <= scale <= high
        check(good, f"{where}.{key}={scale!r}: a number{' from 0 to 1' if high == 1 else ''}, or one of {numbers}")
