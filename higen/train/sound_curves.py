"""The energy and the onsets of a sound as curves over time (`higen cues`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from higen import cue_plot
from higen.curve_source import CurveAsked, CurveFrom
from higen.errors import RequestError
from higen.manifest import Manifest
from higen.measured_curves import sound_curve
from higen.media.sound import FEATURES, read_sound
from higen.train.curves import bars

__all__ = ["SoundCurves", "measure_sound"]


@dataclass(frozen=True)
class SoundCurves:
    """Curves of a sound by name, with one number per frame from 0 to 1. `controls`: by control, the numbers for a
    request. A control without a range has no numbers here.
    """

    fps: float
    features: Mapping[str, list[float]]
    controls: Mapping[str, Mapping[str, list[float]]]

    def as_json(self) -> dict[str, Any]:
        """The curves as JSON values."""
        return {"fps": self.fps, **self.features, "controls": dict(self.controls)}

    def as_text(self) -> str:
        """The curves as bars and as a table."""
        wide = max(map(len, self.features))
        lines = [f"{name:<{wide}}  {bars(values)}" for name, values in self.features.items()]
        lines += ["", "  time s" + "".join(f"{name:>10}" for name in self.features)]
        for i, row in enumerate(zip(*self.features.values(), strict=True)):
            lines.append(f"{i / self.fps:8.2f}" + "".join(f"{value:10.3f}" for value in row))
        return "\n".join(lines)

    def save_plot(self, path: Path) -> None:
        """Save the curves as a picture. Raises OutputError if it cannot be written."""
        panels = [cue_plot.Panel(name, np.array(values)) for name, values in self.features.items()]
        cue_plot.save(cue_plot.draw(panels, len(panels[0].measured), self.fps), path)


def measure_sound(manifest: Manifest, path: Path, fps: int | None = None, frames: int | None = None) -> SoundCurves:
    """The curves of a sound file for a clip of `frames` frames at `fps` frames per second. By default the rate is the
    model's, and the clip has the length of the sound, up to the model's longest clip.

    Raises RequestError for a rate or length below 1, OutputError for a file that cannot be read or is silent.
    """
    rate = manifest.sizes.fps if fps is None else fps
    if rate < 1:
        raise RequestError(f"fps={rate}: 1 or more frames a second")
    if frames is not None and frames < 1:
        raise RequestError(f"frames={frames}: 1 or more")
    most = manifest.sizes.frames[2]
    sound = read_sound(path, 0.0, (most if frames is None else frames) / rate)
    length = min(max(int(np.ceil(sound.seconds * rate - 1e-6)), 1), most) if frames is None else frames
    features = {name: _rounded(feature(sound, length, rate).tolist()) for name, feature in FEATURES.items()}
    given = {name: CurveFrom(path, name) for name, values in features.items() if any(values)}
    controls: dict[str, dict[str, list[float]]] = {}
    for control in manifest.controls:
        if control.kind == "curve" and control.span is not None:
            asked = CurveAsked(control.name, control.encoding, control.span, length, rate)
            # The sound is as long as the requested clip, so there are no remarks for the user.
            made = {name: sound_curve(asked, one, lambda line: None) for name, one in given.items()}
            controls[control.name] = {name: _rounded(values) for name, values in made.items()}
    return SoundCurves(float(rate), features, controls)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]
