"""A model that consists of tables only, and a backend of plain formulas, so that the interpreter's results are exact.

It has two loops, stage names unlike HiGen's, and a stage for every kind of source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.base import RecordingBackend
from higen.manifest import Manifest
from higen.schedule import NoiseSchedule, Solver
from higen.stages import Output, Stage, Tensor
from higen.tables import Control, Loop, NoiseRule, Offset, Replaced, Sizes, Start, TextRules

__all__ = ["DDIM", "LINEAR", "MANIFEST", "Formulas", "changed", "step", "steps"]

Array = NDArray[Any]
Formula = Callable[..., dict[str, Array]]

LINEAR = NoiseSchedule("linear", timesteps=100, beta_start=0.001, beta_end=0.04)
DDIM = Solver("ddim", "leading", offset=1)
COLUMNS = ("t", "A", "B", "C", "alpha", "sigma")


def steps(name: str, frames: int | str, *more: Tensor, hints: str = "mixer") -> tuple[Stage, Stage]:
    """A guided and a plain stage, NAME_two and NAME_one, that take `hints` [B,f,K] and `more`."""
    state = ("B", "C", frames, "H", "W")
    given = (Tensor("latents", state), Tensor("previous", state), *(Tensor(column, ("B",)) for column in COLUMNS))
    own = Tensor("hints", ("B", frames, "K"), source=f"{hints}.hints")
    empty = Tensor("empty_hints", ("B", frames, "K"), source=f"{hints}@negative.hints")
    made = (Output("latents", state), Output("previous", state))
    scale = Tensor("guidance", ("B", frames))
    return (
        Stage(f"{name}_two", "w.safetensors", (*given, scale, own, empty, *more), made),
        Stage(f"{name}_one", "w.safetensors", (*given, own, *more), made),
    )


def loop(name: str, frames: int | str, purpose: int, **more: Any) -> Loop:
    values: dict[str, Any] = {
        "schedule": LINEAR,
        "prediction": "epsilon",
        "solvers": (DDIM, Solver("euler_ancestral", "linspace"), Solver("lcm", original_steps=20)),
        "steps": 3,
        "guidance": 2.0,
        "noise": NoiseRule(purpose),
    }
    return Loop(name=name, guided=f"{name}_two", plain=f"{name}_one", frames=frames, **(values | more))


MANIFEST = Manifest(
    name="tables alone",
    licence="none",
    family="nobody's",
    architecture={},
    prompts=(),
    sizes=Sizes(
        symbols={"L": 5, "C": 2, "K": 3, "Q": 4, "R": 6},
        factor=2,
        multiple=4,
        width=12,
        height=8,
        fps=6,
        frames=(1, 5, 24),
        decoder="paint",
        chunk=2,
        overlap=0,
    ),
    text=TextRules("words.json", 5, clean=False),
    controls=(
        Control("shake", "curve", "a number a frame", "curve", low=-2.0, high=2.0, default=0.5),
        Control("sway", "curve", "a sinusoid a frame", "sinusoid", low=0.0, default=40.0, optional=True),
        Control("drift", "curve", "similarities", "similarity", optional=True),
        Control("grain", "whole", "a whole number", "number", low=0.0, high=9.0, default=3),
        Control("glow", "number", "a number, for each frame", "curve", low=0.0, default=0.25),
        Control("mood", "choice", "a word", "number", choices=("bright", "dim", "dark"), default="dim"),
        Control("push", "number", "how much of the table is run", "number", low=0.0, high=1.0, default=0.5),
        Control("sketch", "picture", "in place of the draft"),
        Control("footage", "clip", "what the film starts with"),
    ),
    stages=(
        Stage(
            "reader",
            "w.safetensors",
            (Tensor("tokens", ("B", "L"), "int64", "text:prompt"),),
            (Output("words", ("B", "K")),),
        ),
        Stage(
            "mixer",
            "w.safetensors",
            (
                Tensor("words", ("B", "K"), source="reader.words"),
                Tensor("shake", ("B", "F"), source="control:shake"),
                Tensor("grain", ("B",), source="control:grain"),
            ),
            (Output("hints", ("B", "F", "K")),),
        ),
        Stage(
            "look",
            "w.safetensors",
            (Tensor("pixels", ("B", 3, "Y", "X"), source="picture:sketch"),),
            (Output("seen", ("B", "C", "H", "W")),),
        ),
        Stage(
            "watch",
            "w.safetensors",
            (Tensor("pixels", ("N", 3, "Y", "X"), source="clip:footage"),),
            (Output("seen", ("N", "C", "H", "W")),),
        ),
        *steps("draft", 1),
        *steps("film", "F", Tensor("still", ("B", "C", "H", "W"), source="draft.latents")),
        Stage("paint", "p.safetensors", (Tensor("z", ("N", "C", "H", "W")),), (Output("pixels", ("N", 3, "Y", "X")),)),
    ),
    loops=(
        loop("draft", 1, 21, controls={"shake": 0.0}, replaced=Replaced("sketch", "look.seen")),
        loop(
            "film",
            "F",
            22,
            least_frames=2,
            guidance=(1.0, 3.0),
            noise=NoiseRule(22, Offset(23, "control:glow")),
            start=Start("footage", "watch.seen", "control:push"),
        ),
    ),
)


def changed(manifest: Manifest, name: str, **values: Any) -> Manifest:
    """The manifest with changed values in the row of the stage or loop `name`."""
    return replace(
        manifest,
        stages=tuple(replace(row, **values) if row.name == name else row for row in manifest.stages),
        loops=tuple(replace(row, **values) if row.name == name else row for row in manifest.loops),
    )


def step(network: Callable[[Array, Array, Array], Array]) -> Formula:
    """A denoising stage (docs/manifest.md, "loops") around m = network(latents, t, hints), computed in float64."""

    def run(**given: Array) -> dict[str, Array]:
        x = given["latents"].astype(np.float64)
        row = {name: given[name].astype(np.float64)[:, None, None, None, None] for name in COLUMNS}
        m = network(x, row["t"], given["hints"].astype(np.float64))
        if "guidance" in given:
            empty = network(x, row["t"], given["empty_hints"].astype(np.float64))
            m = empty + given["guidance"].astype(np.float64)[:, None, :, None, None] * (m - empty)
        x0 = row["alpha"] * x - row["sigma"] * m
        moved = row["A"] * x + row["B"] * m + row["C"] * given["previous"].astype(np.float64)
        return {"latents": moved.astype(np.float32), "previous": x0.astype(np.float32)}

    return run


def linear(x: Array, t: Array, hints: Array) -> Array:
    """Linear, each frame on its own: 0.3 x + t / 1000 + the mean of the frame's hints."""
    return 0.3 * x + t / 1000 + hints.mean(axis=2)[:, None, :, None, None]


def reader(tokens: Array) -> dict[str, Array]:
    return {"words": np.stack([np.sin(tokens.sum(axis=1) * k) for k in (0.1, 0.2, 0.3)], axis=1)}


def mixer(words: Array, shake: Array, grain: Array) -> dict[str, Array]:
    return {"hints": words[:, None, :] + shake[:, :, None] + 0.1 * grain[:, None, None]}


def see(pixels: Array) -> dict[str, Array]:
    """Two channels: the mean and the first pixel of each 2x2 block of the first colour."""
    n, _, height, width = pixels.shape
    blocks = pixels[:, 0].reshape(n, height // 2, 2, width // 2, 2)
    return {"seen": np.stack([blocks.mean(axis=(2, 4)), blocks[:, :, 0, :, 0]], axis=1)}


def paint(z: Array) -> dict[str, Array]:
    """The first channel as grey; each cell becomes 2x2 pixels."""
    grey = np.tanh(z[:, :1]).repeat(2, axis=2).repeat(2, axis=3)
    return {"pixels": np.repeat(grey, 3, axis=1)}


FORMULAS: dict[str, Formula] = {
    "reader": reader,
    "mixer": mixer,
    "look": see,
    "watch": see,
    "draft_two": step(linear),
    "draft_one": step(linear),
    "film_two": step(linear),
    "film_one": step(linear),
    "paint": paint,
}


class Formulas(RecordingBackend):
    """Computes each stage by its formula and records every call's inputs. `lacks`: stages that cannot be run."""

    def __init__(
        self, manifest: Manifest = MANIFEST, formulas: Mapping[str, Formula] = FORMULAS, lacks: tuple[str, ...] = ()
    ) -> None:
        super().__init__(manifest)
        self.formulas = {**FORMULAS, **formulas}
        self.lacks = lacks
        self.given: list[tuple[str, dict[str, Array]]] = []
        self.loaded: list[str] = []

    def prepare(self, stage: str) -> None:
        self.choose(stage)

    def choose(self, *stages: str) -> str:
        chosen = next(stage for stage in stages if stage not in self.lacks)
        if chosen not in self.loaded:
            self.loaded.append(chosen)
        return chosen

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        shapes = super().run(stage, **tensors)  # checks the inputs
        arrays = {name: np.array(value) for name, value in tensors.items()}
        self.given.append((stage, arrays))
        made = {name: np.asarray(value, np.float32) for name, value in self.formulas[stage](**arrays).items()}
        assert {name: value.shape for name, value in made.items()} == {n: v.shape for n, v in shapes.items()}
        return made

    def of(self, stage: str) -> list[dict[str, Array]]:
        """The inputs of each call of a stage."""
        return [arrays for name, arrays in self.given if name == stage]

    @property
    def names(self) -> list[str]:
        """The stages that were called, in order."""
        return [name for name, _ in self.given]
