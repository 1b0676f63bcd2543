"""Tidepool's tables (docs/manifest.md): only data, without PyTorch.

scribe -> chart -> pool_pair x steps -> the still, one frame; or lens(snapshot)
chart, eye(palette), the still -> surge_pair x steps -> develop
"""

from __future__ import annotations

from dataclasses import dataclass

from higen.families.stage_rows import solver_stages
from higen.manifest import Manifest
from higen.schedule import NoiseSchedule, Solver
from higen.stages import Output, Stage, Tensor
from higen.tables import Control, Loop, Mix, NoiseRule, Offset, Replaced, Sizes, Start, TextRules, Windows

__all__ = ["FAMILY", "FILES", "VOCABULARY", "WORDS", "Widths", "manifest", "widths"]

FAMILY = "tidepool"

WORDS = ("a", "crab", "waits", "kelp", "sways", "in", "green", "grey", "light", ",")
VOCABULARY = len(WORDS) + 4
"""The words and the tokenizer's special tokens: padding, start, end, unknown."""

LENGTH = 8
PLACES = 5
"""Number of places in the clip for which a frame's wanted similarity is given."""
EYE = (5, 7)
"""Height and width of the picture that the stage `eye` sees."""

FACTOR = 4

FILES = {
    "words.safetensors": ("scribe", "chart"),
    "water.safetensors": ("pool", "surge"),
    "glass.safetensors": ("lens", "eye", "develop"),
}
"""The networks of each weights file."""


@dataclass(frozen=True)
class Widths:
    """Sizes that follow from the tensors' shapes: latent channels, and the widths of words, curves and conditions."""

    channels: int = 4
    words: int = 8
    curve: int = 6
    bearing: int = 10
    hidden: int = 8


def widths(manifest: Manifest) -> Widths:
    """The widths of a model's networks."""
    fixed = manifest.fixed
    return Widths(fixed["C"], fixed["Dt"], fixed["D"], fixed["E"], int(manifest.architecture["hidden"]))


def manifest(sizes: Widths) -> Manifest:
    """The tables of a model of these widths."""
    return Manifest(
        name="tidepool",
        licence="Apache-2.0",
        family=FAMILY,
        architecture={"hidden": sizes.hidden},
        prompts=("a crab waits", "kelp sways in green light"),
        sizes=Sizes(
            symbols={
                "L": LENGTH,
                "C": sizes.channels,
                "Dt": sizes.words,
                "D": sizes.curve,
                "R": PLACES,
                "E": sizes.bearing,
            },
            factor=FACTOR,
            multiple=2 * FACTOR,
            width=24,
            height=16,
            fps=6,
            frames=(1, 5, 11),
            decoder="develop",
            chunk=2,
            overlap=1,
        ),
        text=TextRules("tokenizer.json", LENGTH, clean=False),
        controls=_controls(),
        stages=(*_readers(), *_steps("pool", 1), *_steps("surge", "F", *_of_the_clip()), _decoder()),
        loops=_loops(),
    )


def _controls() -> tuple[Control, ...]:
    return (
        Control("swell", "curve", "how high the water stands, frame by frame", "curve", -2.0, 2.0, default=0.5),
        Control("current", "curve", "how fast the water runs", "sinusoid", 0.0, default=4.0, optional=True),
        Control("drift", "curve", "how much the view changes over the clip", "similarity", optional=True),
        Control("depth", "whole", "how deep the pool is", "curve", 0, 9, default=3),
        Control("weather", "choice", "the sky", "number", choices=("calm", "storm"), default="calm"),
        Control("carry", "number", "how much of the still the noise keeps", "number", 0.0, 1.0, default=0.3),
        Control("keep", "number", "the part of the steps that footage is given", "number", 0.0, 1.0, default=0.6),
        Control("snapshot", "picture", "the still, instead of one generated from the text"),
        Control("palette", "picture", "a picture with the wanted colours"),
        Control("footage", "clip", "a clip to start from"),
    )


def _readers() -> tuple[Stage, ...]:
    """The stages that make conditions."""
    pixels, latents = ("N", 3, "Y", "X"), (Output("latents", ("N", "C", "H", "W")),)
    return (
        Stage(
            "scribe",
            "words.safetensors",
            (Tensor("tokens", ("B", "L"), "int64", "text:prompt"),),
            (Output("words", ("B", "L", "Dt")),),
        ),
        Stage(
            "chart",
            "words.safetensors",
            (
                Tensor("words", ("B", "L", "Dt"), source="scribe.words"),
                Tensor("current", ("B", "F", "D"), source="control:current"),
                Tensor("swell", ("B", "F"), source="control:swell"),
                Tensor("drift", ("B", "F", "R"), source="control:drift"),
                Tensor("depth", ("B", "F"), source="control:depth"),
                Tensor("weather", ("B",), source="control:weather"),
                Tensor("pace", ("B",), source="control:fps"),
            ),
            (Output("bearings", ("B", "F", "E")),),
        ),
        Stage(
            "eye",
            "glass.safetensors",
            (Tensor("picture", ("B", 3, *EYE), source="picture:palette:clip"),),
            (Output("tint", ("B", "E")),),
        ),
        Stage("lens", "glass.safetensors", (Tensor("pixels", pixels, source="picture:snapshot"),), latents),
        Stage("reel", "glass.safetensors", (Tensor("pixels", pixels, source="clip:footage"),), latents),
    )


def _steps(name: str, frames: int | str, *extra: Tensor) -> tuple[Stage, Stage]:
    bearings = Tensor("bearings", ("B", frames, "E"), source="chart.bearings")
    empty = Tensor("empty_bearings", ("B", frames, "E"), source="chart@negative.bearings")
    return solver_stages(f"{name}_pair", f"{name}_single", "water.safetensors", frames, (bearings, empty, *extra))


def _of_the_clip() -> tuple[Tensor, ...]:
    return (
        Tensor("still", ("B", "C", "H", "W"), source="pool.latents"),
        Tensor("tint", ("B", "E"), source="eye.tint"),
        Tensor("foam", ("B", 1, "F", "H", "W"), source="noise:41"),
    )


def _decoder() -> Stage:
    """Its output depends on the neighbouring frames, so neither samples nor chunks may be mixed."""
    return Stage(
        "develop",
        "glass.safetensors",
        (
            Tensor("latents", ("B", "C", "F", "H", "W")),
            Tensor("grain", ("B", 1, "F", "H", "W"), source="noise:42"),
        ),
        (Output("pixels", ("B", 3, "F", "Y", "X")),),
        batch=False,
    )


def _loops() -> tuple[Loop, Loop]:
    pool = Loop(
        name="pool",
        guided="pool_pair",
        plain="pool_single",
        frames=1,
        schedule=NoiseSchedule("scaled_linear", timesteps=200, beta_start=0.002, beta_end=0.04),
        prediction="epsilon",
        solvers=(Solver("heun", "linspace"), Solver("euler", "linspace")),
        steps=3,
        guidance=2.0,
        noise=NoiseRule(21),
        controls={"swell": 0.0},
        replaced=Replaced("snapshot", "lens.latents"),
    )
    surge = Loop(
        name="surge",
        guided="surge_pair",
        plain="surge_single",
        frames="F",
        least_frames=2,
        schedule=NoiseSchedule("linear", timesteps=300, beta_start=0.001, beta_end=0.02),
        prediction="epsilon",
        solvers=(Solver("euler_ancestral", "linspace"), Solver("lcm", original_steps=25), Solver("ddim", eta=0.5)),
        steps=4,
        guidance=(1.0, 3.0),
        noise=NoiseRule(22, Offset(23, 0.1), Mix("pool", "control:carry")),
        start=Start("footage", "reel.latents", "control:keep"),
        windows=Windows(length=6, stride=4),
    )
    return pool, surge
