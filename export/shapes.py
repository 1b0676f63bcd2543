"""The sizes with which a stage is traced and checked, and example inputs for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from higen.axes import limits
from higen.errors import RequestError
from higen.manifest import Manifest
from higen.stages import TOKENS, Stage, Tensor, source

__all__ = ["checked_sizes", "example_inputs", "fixed_sizes", "sizes_for", "static_sizes", "traced_sizes"]

MANY = 8
"""If B = F in a check, it has at most this many samples."""

PIXELS = ("H", "W", "Y", "X")

LARGEST_AREA = 4096
"""The model's own size is checked only if a clip has at most this many latent cells: large models take minutes."""


def example_inputs(
    manifest: Manifest, stage: Stage, sizes: Mapping[str, int], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs of a stage for these sizes: tokens from 0 to 4, controls within their range, masks of 0 and 1,
    and normally distributed values for everything else."""
    random = torch.Generator().manual_seed(seed)
    return {
        tensor.name: _values(manifest, tensor, [n if isinstance(n, int) else sizes[n] for n in tensor.shape], random)
        for tensor in stage.inputs
    }


def _values(manifest: Manifest, tensor: Tensor, shape: list[int], random: torch.Generator) -> torch.Tensor:
    if tensor.dtype == "int64":
        return torch.randint(0, 5, shape, generator=random)
    normal = torch.randn(shape, generator=random)
    origin = source(tensor.source)
    if (origin.kind, origin.name) == ("known", "mask") or origin.kind == "places":
        return (normal > 0.5).float()
    if origin.kind != "control" or origin.name == "fps":
        return normal
    control = manifest.control(origin.name)
    if control.kind == "choice":
        return torch.randint(0, len(control.choices), shape, generator=random).float()
    if control.encoding not in ("number", "curve"):
        return normal
    low, high = control.low, control.high
    if low is not None and high is not None:
        values = low + (high - low) * torch.rand(shape, generator=random)
    elif low is not None:
        values = low + normal.abs()
    else:
        values = normal if high is None else high - normal.abs()
    return values.round() if control.kind == "whole" else values


def sizes_for(manifest: Manifest, free: Mapping[str, int]) -> dict[str, int]:
    """A size for every symbol of the stage table: the model's fixed sizes, `free`, and Y and X for its H and W."""
    factor = manifest.sizes.factor
    return {**manifest.fixed, **free, "Y": free["H"] * factor, "X": free["W"] * factor}


def static_sizes(manifest: Manifest, shape: str) -> dict[str, int]:
    """Sizes of B, F, H and W for "BxFxHxW" with H and W in pixels: "1x32x256x448".

    Raises RequestError for anything else and for sizes that the model cannot have.
    """
    factor, step = manifest.sizes.factor, manifest.sizes.multiple
    fewest, _, most = manifest.sizes.frames
    try:
        batch, frames, height, width = (int(part) for part in shape.split("x"))
    except ValueError:
        raise RequestError(f"static={shape!r}: samples, frames, height and width, such as 1x32x256x448") from None
    if batch < 1 or not fewest <= frames <= most:
        raise RequestError(f"static={shape!r}: at least 1 sample and {fewest} to {most} frames")
    if height < 1 or width < 1 or height % step or width % step:
        raise RequestError(f"static={shape!r}: height and width are multiples of {step} pixels")
    return {"B": batch, "F": frames, "H": height // factor, "W": width // factor}


def fixed_sizes(manifest: Manifest, stage: Stage, static: Mapping[str, int] | None) -> dict[str, int]:
    """The free symbols of a stage that its graph fixes: those with only one possible size, and those in `static`.

    The runtimes run all other stages than the denoising ones on one sample at a time and on varying numbers of frames,
    so only the height and width of these stages can be fixed.
    """
    allowed = limits(manifest, stage.name)
    fixed = {symbol: low for symbol, (low, high) in allowed.items() if low == high}
    if static is not None:
        sizes = sizes_for(manifest, static)
        pixels = {symbol: sizes[symbol] for symbol in PIXELS}
        batch, frames = min(static["B"], allowed["B"][1]), min(static["F"], allowed["F"][1])
        fixed |= {"B": batch, "F": frames, **pixels} if stage.denoises else pixels
    return fixed


def traced_sizes(manifest: Manifest, stage: Stage, fixed: Mapping[str, int]) -> dict[str, int]:
    """The sizes for tracing. All but the `fixed` ones differ, so that the tracer does not take two axes for one."""
    allowed, step = limits(manifest, stage.name), manifest.sizes.multiple // manifest.sizes.factor
    taken = set[int]()

    def choose(symbol: str, wanted: list[int]) -> int:
        low, high = allowed.get(symbol, (1, max(wanted)))
        inside = [n for n in wanted if max(low, 2) <= n <= high]  # the tracer treats an axis of 1 as fixed
        free = [n for n in inside if n not in taken]
        taken.add(chosen := (free or inside)[0])
        return chosen

    low, high = allowed["F"]
    nearest = sorted(range(max(low, 2), min(high, max(low, 5) + 8) + 1), key=lambda n: abs(n - 5))
    wanted = {
        "F": nearest,
        "B": [2, 3, 4],
        "N": [3, 4, 2],
        "H": [k * step for k in range(2, 9)],
        "W": [k * step for k in range(3, 9)],
        **_tokens(allowed),
    }
    free = {symbol: fixed[symbol] if symbol in fixed else choose(symbol, wanted[symbol]) for symbol in wanted}
    return sizes_for(manifest, free)


def _tokens(allowed: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    """The token counts of two and more chunks. Empty if texts have only one chunk."""
    length, most = allowed.get(TOKENS, (1, 0))
    return {TOKENS: list(range(2 * length, most + 1, length))} if most else {}


def checked_sizes(
    manifest: Manifest, stage: Stage, static: Mapping[str, int] | None = None
) -> Iterator[dict[str, int]]:
    """Sizes for the parity gate that were not used in tracing: B = F (which exporters often get wrong), one sample, one
    frame if the stage allows it, and the model's own size; the first ones are not square. With `static`: three checks
    at its sizes.
    """
    fixed = fixed_sizes(manifest, stage, static)
    known = manifest.sizes
    step = known.multiple // known.factor
    chunks = _tokens(limits(manifest, stage.name))
    u = step if step >= 8 else 2 * step
    own = {"H": known.height // known.factor, "W": known.width // known.factor}
    rows = [
        {"B": 3, "F": 3, "N": 2, "H": u, "W": 2 * u},
        {"B": 1, "F": 8, "N": 1, "H": 2 * u, "W": u},
        {"B": 4, "F": 2, "N": 4, "H": u, "W": 3 * u},
    ]
    symbols = [n for n in stage.free(manifest.fixed) if n not in fixed]
    if "F" in symbols and limits(manifest, stage.name)["F"][0] == 1:
        rows.append({"B": 2, "F": 1, "N": 1, "H": u, "W": 2 * u})
    if own["H"] * own["W"] * known.frames[1] <= LARGEST_AREA:
        rows.append({"B": 1, "F": known.frames[1], "N": 2, **own})
    if static is not None:
        rows = [{"B": n, "F": n, "N": n, **own} for n in (1, 2, 3)]
    if chunks:  # first the most chunks that a text may have, then one fewer, and so on
        length, most = limits(manifest, stage.name)[TOKENS]
        rows = [{**row, TOKENS: max(most - i * length, length)} for i, row in enumerate(rows)]
    traced = traced_sizes(manifest, stage, fixed)
    seen = {tuple(traced[symbol] for symbol in symbols)} if symbols else set()
    for row in rows:
        sizes = sizes_for(manifest, {**_inside(manifest, stage, row), **fixed})
        shape = tuple(sizes[symbol] for symbol in symbols)
        if static is not None or shape not in seen:
            seen.add(shape)
            yield sizes


def _inside(manifest: Manifest, stage: Stage, row: dict[str, int]) -> dict[str, int]:
    """The sizes with B, F and N clamped to the stage's limits. B = F is kept, up to MANY frames."""
    allowed = limits(manifest, stage.name)
    moved = {**row, **{symbol: min(max(row[symbol], low), high) for symbol, (low, high) in allowed.items()}}
    if row["B"] == row["F"] and stage.batch and "F" in stage.free(manifest.fixed) and moved["F"] <= MANY:
        moved["B"] = moved["F"]
    return moved
