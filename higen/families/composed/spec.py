"""Joins the tables of two models into one model (docs/manifest.md). Only data, no PyTorch.

The first model's loops run for one frame. Its decoder becomes a stage that decodes the latents of the last of these
loops. The second model takes this stage's output as a picture, in place of its picture control. All other rows stay.
Names of the second model that the first model also has get a prefix. Noise streams of the second model whose number the
first model also has get a free number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from higen.errors import ManifestError, ModelError
from higen.manifest import Manifest
from higen.stages import Stage, source
from higen.tables import COMMON, MAX_SIDE, Control, Known, Loop, Mix, Replaced, Sizes, Start, Variant
from higen.typed_json import from_json, to_json

__all__ = ["FAMILY", "Architecture", "Part", "architecture", "compose", "part_manifest"]

FAMILY = "composed"
PREFIX = "second_"

Row = TypeVar("Row", Replaced, Start)


@dataclass(frozen=True)
class Part:
    """One of the two models.

    tables   its own manifest
    stages   {name of a stage in its manifest: name in the composed model}
    weights  {name of its weights file or tokenizer: name in the composed model}
    """

    tables: dict[str, Any]
    stages: dict[str, str]
    weights: dict[str, str]


@dataclass(frozen=True)
class Architecture:
    """Both models, from which the torch backend builds their networks."""

    first: Part
    second: Part


def architecture(manifest: Manifest) -> Architecture:
    """The two parts of a composed manifest. Raises ManifestError for another manifest."""
    if manifest.family != FAMILY:
        raise ManifestError(f"family={manifest.family!r}: {FAMILY} is wanted here")
    return from_json(Architecture, manifest.architecture, "architecture", whole=True)


def part_manifest(part: Part) -> Manifest:
    """The original manifest of one of the two models. Raises ManifestError."""
    return from_json(Manifest, part.tables, "architecture", whole=True)


@dataclass(frozen=True)
class _Rows:
    """The rows that one model contributes."""

    stages: tuple[Stage, ...]
    controls: tuple[Control, ...]
    loops: tuple[Loop, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights files, without duplicates."""
        return tuple(dict.fromkeys(stage.weights for stage in self.stages))


def compose(first: Manifest, second: Manifest, same_tokenizer: bool) -> Manifest:
    """The tables of the model that runs `first`, then `second`. `same_tokenizer`: their tokenizer files are equal.

    Raises ModelError with the reason if the two do not fit together.
    """
    _check_fit(first, second, same_tokenizer)
    for loop in (*first.loops, *second.loops):  # the presets of both models are left out
        if loop.stretch is not None and loop.stretch.by != 1:
            raise ModelError(f"loops.{loop.name}.stretch: a composed model cannot have a stretch other than by 1")
    picture = _taken_picture(second)
    drawing, filming = _drawing(first), _filming(second, picture)
    names = _Names(first, drawing, second, filming)
    clip = names.rows(filming, picture, f"picture:{first.decoder.name}.{first.decoder.outputs[0].name}")
    text = first.text or second.text
    if text is not None and first.text is None:
        text = replace(text, tokenizer=names.files[text.tokenizer])
    files = (*drawing.weights, *([first.text.tokenizer] if first.text is not None else []))
    parts = Architecture(
        Part(to_json(first), {stage.name: stage.name for stage in drawing.stages}, {name: name for name in files}),
        Part(to_json(second), names.stages, names.files),
    )
    return Manifest(
        name=f"{first.name} + {second.name}",
        licence=first.licence if first.licence == second.licence else f"{first.licence}; then {second.licence}",
        family=FAMILY,
        architecture=to_json(parts),
        prompts=first.prompts,
        sizes=names.sizes(first, second, filming),
        text=text,
        controls=(*drawing.controls, *clip.controls),
        stages=(*drawing.stages, *clip.stages),
        loops=(*drawing.loops, *clip.loops),
    )


def _check_fit(first: Manifest, second: Manifest, same_tokenizer: bool) -> None:
    fewest = first.sizes.frames[0]
    if fewest > 1:
        raise ModelError(f"{first.name}: makes {fewest} frames or more, but the first model must make a single picture")
    if first.sizes.factor != second.sizes.factor:
        raise ModelError(
            f"{first.name} has {first.sizes.factor} pixels per latent cell and {second.name} {second.sizes.factor}: "
            f"one request has one size of latents, so they must be equal"
        )
    multiple = math.lcm(first.sizes.multiple, second.sizes.multiple)
    if multiple > MAX_SIDE:
        raise ModelError(
            f"{first.name} has sides of multiples of {first.sizes.multiple} pixels and {second.name} of "
            f"{second.sizes.multiple}: no side up to {MAX_SIDE} is a multiple of both"
        )
    if first.text is not None and second.text is not None:
        rules = replace(second.text, tokenizer=first.text.tokenizer)
        if rules != first.text or not same_tokenizer:
            raise ModelError(
                f"{first.name} and {second.name} tokenize texts by different rules, but a composed model has one "
                "tokenizer"
            )


def _taken_picture(second: Manifest) -> str:
    """The picture control of the second model that the first model's picture replaces.

    It is the only picture that the second model requires, or else the only picture that replaces a loop.
    """
    for loop in second.loops:
        if loop.start is not None and loop.start.needed:
            raise ModelError(
                f"{second.name}: its loop {loop.name} begins from a whole video, which it draws at another size, and a "
                f"composed model has one size: give it the first model's video as {loop.start.control}, a second pass"
            )
    needed = second.pictures_of(*second.denoising, second.sizes.decoder)
    pictures = [name for name in needed if second.control(name).kind == "picture"]
    standing = [loop.replaced.control for loop in second.loops if loop.replaced is not None]
    standing = [name for name in dict.fromkeys(standing) if second.control(name).kind == "picture"]
    found = pictures or standing
    if len(found) != 1:
        what = f"takes {len(found)} pictures, {', '.join(found)}" if found else "does not make a clip from a picture"
        raise ModelError(f"{second.name}: {what}; the second model must make a clip from one picture")
    for loop in second.loops:
        if loop.start is not None and loop.start.control == found[0]:
            raise ModelError(f"{second.name}: its loop {loop.name} begins from {found[0]} and redraws it")
        mixed = loop.noise.mix.loop if loop.noise.mix is not None else None
        if mixed is not None and (row := second.loop(mixed).replaced) is not None and row.control == found[0]:
            raise ModelError(
                f"{second.name}: the noise of {loop.name} is mixed with {mixed}, but {found[0]} replaces {mixed}"
            )
    return found[0]


def _drawing(first: Manifest) -> _Rows:
    """The first model's rows for one frame. Its decoder becomes a stage that takes the latents of its last loop.

    Loops for longer clips are left out, with everything that only they use.
    """
    loops = tuple(
        replace(loop, frames=1, least_frames=1, windows=None, known=None, stretch=None)
        for loop in first.loops
        if loop.least_frames <= 1
    )
    decoder = first.decoder
    fed = [tensor for name in first.feeding(decoder.name) for tensor in first.stage(name).inputs]
    if any("F" in tensor.shape for tensor in fed if tensor.source != "state"):
        raise ModelError(
            f"{first.name}: its decoder {decoder.name} has an input per frame, which a single picture does not have"
        )
    fed_by_loop = tuple(
        replace(tensor, source=f"{loops[-1].name}.latents") if tensor.source == "state" else tensor
        for tensor in decoder.inputs
    )
    stages = [replace(s, inputs=fed_by_loop) if s.name == decoder.name else s for s in first.stages]
    return _used(first, stages, loops, (decoder.name,))


def _filming(second: Manifest, picture: str) -> _Rows:
    """The second model's rows for a picture that is always given. The loop that it replaces is left out."""
    replaced = {
        f"{loop.name}.latents": loop.replaced.latents
        for loop in second.loops
        if loop.replaced is not None and loop.replaced.control == picture
    }
    stages = [
        replace(s, inputs=tuple(replace(t, source=replaced.get(t.source, t.source)) for t in s.inputs))
        for s in second.stages
    ]
    loops = tuple(
        replace(loop, replaced=_instead(loop.replaced, replaced), start=_instead(loop.start, replaced), stretch=None)
        for loop in second.loops
        if f"{loop.name}.latents" not in replaced
    )
    if not loops:
        raise ModelError(f"{second.name}: no loop is left to run if {picture} is always given")
    return _used(second, stages, loops, second.decoders)


def _instead(row: Row | None, replaced: Mapping[str, str]) -> Row | None:
    return None if row is None else replace(row, latents=replaced.get(row.latents, row.latents))


def _used(model: Manifest, stages: list[Stage], loops: tuple[Loop, ...], decoders: tuple[str, ...]) -> _Rows:
    """The rows that the loops and these decoders use."""
    rows = {stage.name: stage for stage in stages}
    open_ones = [*(name for loop in loops for name in loop.stages), *decoders]
    rows_of = [row for loop in loops for row in (loop.replaced, loop.start, loop.known) if row is not None]
    open_ones += [source(row.latents).name for row in rows_of]
    kept: set[str] = set()
    while open_ones:
        name = open_ones.pop()
        if name in rows and name not in kept:
            kept.add(name)
            found = [source(tensor.source) for tensor in rows[name].inputs]
            open_ones += [one.name for one in found if one.kind == "made"]
    used = tuple(stage for stage in stages if stage.name in kept)
    preview = model.sizes.preview
    names = _controls_of(used, loops)
    names |= {preview.control} if preview is not None and preview.decoder in kept else set()
    return _Rows(used, tuple(control for control in model.controls if control.name in names), loops)


def _controls_of(stages: tuple[Stage, ...], loops: tuple[Loop, ...]) -> set[str]:
    """The controls that these rows use."""
    found = [source(tensor.source) for stage in stages for tensor in stage.inputs]
    used = {one.name for one in found if one.kind in ("control", "picture", "clip")}
    for loop in loops:
        used |= {row.control for row in (loop.replaced, loop.start, loop.known) if row is not None}
        used |= {loop.variant.control} if loop.variant is not None else set()
        used |= {loop.known.mask} if loop.known is not None and loop.known.mask is not None else set()
        scales = [row.scale for row in (loop.noise.offset, loop.noise.mix) if row is not None]
        scales += [loop.start.strength] if loop.start is not None else []
        used |= {scale.partition(":")[2] for scale in scales if isinstance(scale, str)}
    return used


class _Names:
    """The names of the second model's rows in the composed model. They differ from all names of the first model."""

    def __init__(self, first: Manifest, drawing: _Rows, second: Manifest, filming: _Rows) -> None:
        taken = {*(stage.name for stage in drawing.stages), *(loop.name for loop in drawing.loops)}
        names = [stage.name for stage in filming.stages]
        self._rows = _free([*names, *(loop.name for loop in filming.loops)], taken)
        self.stages = {name: self._rows[name] for name in names}
        self._controls = _free([row.name for row in filming.controls], {row.name for row in drawing.controls})
        tokenizers = [model.text.tokenizer for model in (first, second) if model.text is not None]
        self.files = _free(filming.weights, {*drawing.weights, *tokenizers})
        if second.text is not None:  # both have the same tokenizer, or the first model has none
            self.files[second.text.tokenizer] = tokenizers[0]
        clash = {name for name, size in second.fixed.items() if first.fixed.get(name, size) != size}
        self._symbols = _free([*second.fixed], first.fixed, clash)
        self._purposes = _free_numbers(_purposes(drawing), _purposes(filming))

    def rows(self, filming: _Rows, picture: str, shown: str) -> _Rows:
        """The second model's rows under their new names, with the source `shown` in place of the control `picture`."""
        return _Rows(
            tuple(self._stage(stage, picture, shown) for stage in filming.stages),
            tuple(replace(row, name=self._controls[row.name]) for row in filming.controls if row.name != picture),
            tuple(self._loop(loop) for loop in filming.loops),
        )

    def sizes(self, first: Manifest, second: Manifest, filming: _Rows) -> Sizes:
        """The second model's sizes. Sides are valid for both models; the fewest frames are those of its loops."""
        fewest, default, most = second.sizes.frames
        fewest = max(fewest, min(loop.least_frames for loop in filming.loops))
        sizes, multiple = second.sizes, math.lcm(first.sizes.multiple, second.sizes.multiple)
        row = sizes.preview
        symbols = {self._symbols[name]: size for name, size in second.fixed.items()}
        return replace(
            sizes,
            symbols={**first.fixed, **symbols},
            multiple=multiple,
            frames=(fewest, max(fewest, default), most),
            width=max(multiple, sizes.width // multiple * multiple),
            height=max(multiple, sizes.height // multiple * multiple),
            decoder=self._rows[sizes.decoder],
            preview=row and replace(row, control=self._controls[row.control], decoder=self._rows[row.decoder]),
        )

    def _stage(self, stage: Stage, picture: str, shown: str) -> Stage:
        def shape(axes: tuple[int | str, ...]) -> tuple[int | str, ...]:
            return tuple(self._symbols.get(n, n) if isinstance(n, str) else n for n in axes)

        return replace(
            stage,
            name=self._rows[stage.name],
            weights=self.files[stage.weights],
            inputs=tuple(
                replace(tensor, shape=shape(tensor.shape), source=self._source(tensor.source, picture, shown))
                for tensor in stage.inputs
            ),
            outputs=tuple(replace(made, shape=shape(made.shape)) for made in stage.outputs),
        )

    def _source(self, text: str, picture: str = "", shown: str = "") -> str:
        found = source(text)
        clip = ":clip" if found.resampled else ""
        if found.kind == "picture" and found.name == picture:
            return shown + clip
        if found.kind == "made":
            given = f"@{self._controls[found.given]}" if found.given else ""
            made = f"{self._rows[found.name]}{'@negative' if found.negative else given}.{found.output}"
            return f"picture:{made}{clip}" if found.shown else made
        if found.kind == "noise":
            return f"noise:{self._purposes[int(found.name)]}"
        if found.kind in ("control", "picture", "clip") and found.name not in COMMON:
            return f"{found.kind}:{self._controls[found.name]}{clip}"
        return text

    def _scale(self, scale: float | str) -> float | str:
        return f"control:{self._controls[scale.partition(':')[2]]}" if isinstance(scale, str) else scale

    def _loop(self, loop: Loop) -> Loop:
        noise = replace(loop.noise, purpose=self._purposes[loop.noise.purpose])
        if noise.offset is not None:
            purpose = self._purposes[noise.offset.purpose]
            noise = replace(noise, offset=replace(noise.offset, purpose=purpose, scale=self._scale(noise.offset.scale)))
        if noise.mix is not None:
            noise = replace(noise, mix=Mix(self._rows[noise.mix.loop], self._scale(noise.mix.scale)))
        stands, starts = loop.replaced, loop.start
        if stands is not None:
            latents = self._source(stands.latents)
            stands = replace(stands, control=self._controls[stands.control], latents=latents)
        if starts is not None:
            latents, strength = self._source(starts.latents), self._scale(starts.strength)
            starts = replace(starts, control=self._controls[starts.control], latents=latents, strength=strength)
        known = loop.known
        if known is not None:
            mask = None if known.mask is None else self._controls[known.mask]
            known = Known(self._controls[known.control], self._source(known.latents), mask)
        variant = loop.variant
        if variant is not None:
            variant = Variant(self._controls[variant.control], *map(self._row, (variant.guided, variant.plain)))
        return replace(
            loop,
            name=self._rows[loop.name],
            guided=self._row(loop.guided),
            plain=self._row(loop.plain),
            controls={self._controls[name]: value for name, value in loop.controls.items()},
            noise=noise,
            replaced=stands,
            start=starts,
            known=known,
            variant=variant,
        )

    def _row(self, name: str | None) -> str | None:
        return None if name is None else self._rows[name]


def _free(names: Collection[str], taken: Collection[str], clash: Collection[str] | None = None) -> dict[str, str]:
    """{name: the name, with prefixes if it is taken}; all results differ. `clash`: only these are renamed."""
    used = {*taken, *names}
    found: dict[str, str] = {}
    for name in names:
        free = name
        if name in (taken if clash is None else clash):
            while free in used:
                free = PREFIX + free
            used.add(free)
        found[name] = free
    return found


def _purposes(model: _Rows) -> set[int]:
    """The numbers of the noise streams that a model uses."""
    found = {loop.noise.purpose for loop in model.loops}
    found |= {loop.noise.offset.purpose for loop in model.loops if loop.noise.offset is not None}
    sources = [source(tensor.source) for stage in model.stages for tensor in stage.inputs]
    return found | {int(one.name) for one in sources if one.kind == "noise"}


def _free_numbers(taken: set[int], own: set[int]) -> Mapping[int, int]:
    """{stream number: the number itself, or a free number if the first model uses it too}."""
    found, next_one = {n: n for n in own - taken}, max(taken | own, default=0) + 1
    for n in sorted(own & taken):
        found[n], next_one = next_one, next_one + 1
    return found
