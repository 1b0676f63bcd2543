"""Requests: missing values get the model's defaults, and each wrong value is one RequestError that names it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter_model import MANIFEST, changed

from higen.conditioning import curve_values, similarity_rows
from higen.errors import HigenError, RequestError
from higen.families.higen import spec
from higen.images import load_picture
from higen.loop_settings import LoopSettings
from higen.manifest import Manifest
from higen.request import MAX_SEED, Picture, Request, make_request
from higen.stages import Stage
from higen.tables import COMMON, Control, NoiseRule, Replaced, Start

HIGEN = spec.manifest(TINY)
FREE = spec.manifest(replace(TINY, optional_cues=True))
"""The tiny model (4 frames of 24x16, sizes in multiples of 4) with optional cues."""


def request(prompt: Any = "a whale", manifest: Manifest = HIGEN, **options: Any) -> Request:
    common = {name: options.pop(name) for name in (*COMMON, "warn") if name in options}
    return make_request(manifest, prompt, **common, controls=options, load=load_picture)


def as_dict(made: Request) -> dict[str, Any]:
    """A request's fields together with its controls; arrays become lists."""
    values = {field.name: getattr(made, field.name) for field in fields(made) if field.name not in ("controls", "warn")}
    return values | {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in made.controls.items()}


def test_what_is_not_given_is_the_models_default() -> None:
    assert as_dict(request()) == {
        "prompts": ("a whale",),
        "negative_prompt": "",
        "seeds": (0,),
        "steps": (4, 4),
        "guidance": (3.0, 3.0),
        "solvers": ("ddim", "ddim"),
        "frames": 4,
        "height": 16,
        "width": 24,
        "fps": 8,
        "settings": LoopSettings(),
        "motion": 60.0,
        "appearance": 1.0,
        "offset_noise": 0.1,
        "image": None,
        "keyframes": None,
        "mask": None,
        "video": None,
        "strength": 0.6,
    }


@pytest.mark.parametrize(
    "name", ["negative_prompt", "seed", "steps", "guidance", "solver", "frames", "width", "height", "fps", *"maoi"]
)
def test_none_is_the_default(name: str) -> None:
    name = {"m": "motion", "a": "appearance", "o": "offset_noise", "i": "image"}.get(name, name)
    assert as_dict(request(**{name: None})) == as_dict(request())


def test_everything_that_is_given_is_taken() -> None:
    made = request(
        ["a whale", "a star"],
        negative_prompt="text",
        seed=[3, MAX_SEED],
        steps=(1, 1000),
        guidance=[0, 7.5],
        solver="dpm++2m",
        frames=1,
        height=4096,
        width=4,
        fps=240,
        motion=0,
        appearance=-1.0,
        offset_noise=0,
    )
    assert made.prompts == ("a whale", "a star")
    assert made.negative_prompt == "text"
    assert made.seeds == (3, MAX_SEED)
    assert made.steps == (1, 1000)
    assert made.guidance == (0.0, 7.5)
    assert (made.solvers, made.frames, made.height, made.width, made.fps) == (("dpm++2m",) * 2, 1, 4096, 4, 240)
    assert [made.controls[name] for name in ("motion", "appearance", "offset_noise")] == [0, -1.0, 0.0]


def test_one_value_serves_both_loops_and_all_prompts() -> None:
    made = request(("a whale", "a star"), seed=5, steps=7, guidance=2)
    assert made.seeds == (5, 5)
    assert made.steps == (7, 7)
    assert made.guidance == (2.0, 2.0)


def test_a_value_for_each_loop_may_leave_some_at_their_default() -> None:
    made = request(steps=(None, 9), guidance=[2, None], solver=("dpm++2m", None))
    assert made.steps == (4, 9)
    assert made.guidance == (2.0, 3.0)
    assert made.solvers == ("dpm++2m", "ddim")


def test_numpy_numbers_become_python_numbers() -> None:
    made = request(
        seed=np.uint64(MAX_SEED), steps=np.int32(3), guidance=np.float32(1.5), frames=np.int64(2), width=np.int16(8),
        offset_noise=np.float64(0.5),
    )  # fmt: skip
    values = (*made.seeds, *made.steps, *made.guidance, made.frames, made.width, made.controls["offset_noise"])
    assert values == (MAX_SEED, 3, 3, 1.5, 1.5, 2, 8, 0.5)
    assert {type(value) for value in values} == {int, float}
    assert request(["a", "b"], seed=np.array([1, 2]), steps=np.array([2, 3])).seeds == (1, 2)


def test_zero_is_a_value_and_not_a_missing_one() -> None:
    made = request(seed=0, guidance=0, motion=0, appearance=0, offset_noise=0)
    assert made.guidance == (0.0, 0.0)
    assert [made.controls[name] for name in ("motion", "appearance", "offset_noise")] == [0, 0, 0.0]


@pytest.mark.parametrize("word", ["random", -1])
def test_a_drawn_seed_is_in_the_request(word: Any) -> None:
    drawn = {request(seed=word).seeds[0] for _ in range(20)}
    assert len(drawn) > 15
    assert all(0 <= seed < 2**32 for seed in drawn)
    one, two = request(["a", "b"], seed=[word, 3]).seeds
    assert two == 3
    assert one != request(["a", "b"], seed=[word, 3]).seeds[0]


WRONG = [
    # Each message has the value and what is allowed.
    ({"prompt": ""}, r"prompt='': a prompt with at least one word"),
    ({"prompt": " \t\n"}, r"prompt=' \\t\\n': a prompt with at least one word"),
    ({"prompt": []}, r"prompt=\[\]: a string or a list of strings"),
    ({"prompt": None}, r"prompt=None: a string or a list"),
    ({"prompt": b"a whale"}, r"prompt=b'a whale': a string or a list"),
    ({"prompt": 7}, r"prompt=7: a string or a list"),
    ({"prompt": {"a": "b"}}, r"prompt=\{'a': 'b'\}: a string or a list"),
    ({"prompt": ["a whale", 7]}, r"prompt=7: a string"),
    ({"prompt": ["a whale", ""]}, r"prompt='': a prompt with at least one word"),
    ({"prompt": ["a whale", ["a star"]]}, r"prompt=\['a star'\]: a string"),
    ({"prompt": "\ud800 whale"}, r"prompt='\\ud800 whale': not valid Unicode"),
    ({"negative_prompt": 7}, r"negative_prompt=7: a string"),
    ({"negative_prompt": ["text"]}, r"negative_prompt=\['text'\]: a string"),
    ({"negative_prompt": "\udfff"}, r"negative_prompt='\\udfff': not valid Unicode"),
    ({"seed": -2}, rf"seed=-2: a whole number from 0 to {MAX_SEED}"),
    ({"seed": MAX_SEED + 1}, rf"seed={MAX_SEED + 1}: a whole number from 0 to"),
    ({"seed": 1.0}, r"seed=1\.0: a whole number"),
    ({"seed": True}, r"seed=True: a whole number"),
    ({"seed": np.True_}, r"seed=np\.True_: a whole number"),
    ({"seed": "1"}, r"seed='1': a whole number"),
    ({"seed": [None, 1]}, r"seed has 2 entries"),
    ({"seed": "Random"}, r"seed='Random': a whole number"),
    ({"seed": [1, 2]}, r"seed has 2 entries: one number, or one per prompt \(1\)"),
    ({"seed": []}, r"seed has 0 entries"),
    ({"seed": [True]}, r"seed=True: a whole number"),
    ({"steps": 0}, r"steps=0: a whole number from 1 to 1000"),
    ({"steps": 1001}, r"steps=1001: a whole number from 1 to 1000"),
    ({"steps": -5}, r"steps=-5: a whole number"),
    ({"steps": 2.0}, r"steps=2\.0: a whole number"),
    ({"steps": True}, r"steps=True: a whole number"),
    ({"steps": [4]}, r"steps=\[4\]: one value, or 2 \(one per loop: spatial, temporal\)"),
    ({"steps": [4, 4, 4]}, r"steps=\[4, 4, 4\]: one value, or 2"),
    ({"steps": [4, 0]}, r"steps=0: a whole number"),
    ({"steps": "4"}, r"steps='4': a whole number"),
    ({"guidance": math.nan}, r"guidance=nan: a finite number, 0 or more"),
    ({"guidance": math.inf}, r"guidance=inf: a finite number"),
    ({"guidance": -0.5}, r"guidance=-0\.5: a finite number, 0 or more, or one per frame \(1\)"),
    ({"guidance": 10**400}, r"guidance=1000+\.\.\.0+: a finite number"),
    ({"guidance": 1e39}, r"guidance=1e\+39: a finite number"),
    ({"guidance": True}, r"guidance=True: a finite number"),
    ({"guidance": "12"}, r"guidance='12': a finite number"),
    ({"guidance": [1.0, math.nan]}, r"guidance=nan: a finite number"),
    ({"guidance": [1.0, 2.0, 3.0]}, r"guidance=\[1\.0, 2\.0, 3\.0\]: one value, or 2"),
    ({"solver": "euler"}, r"solver='euler': the loop spatial takes 'ddim', 'dpm\+\+2m'"),
    ({"solver": "DDIM"}, r"solver='DDIM': the loop spatial takes"),
    ({"solver": 1}, r"solver=1: the loop spatial takes"),
    ({"solver": ["ddim"]}, r"solver=\['ddim'\]: one value, or 2 \(one per loop"),
    ({"solver": ["ddim", "heun"]}, r"solver='heun': the loop temporal takes"),
    ({"frames": 0}, r"frames=0: a whole number from 1 to 40"),
    ({"frames": 10_000}, r"frames=10000: a whole number from 1 to 40"),
    ({"frames": 4.0}, r"frames=4\.0: a whole number"),
    ({"frames": True}, r"frames=True: a whole number"),
    ({"width": 26}, r"width=26: a multiple of 4; the nearest are 24 and 28"),
    ({"height": 17}, r"height=17: a multiple of 4; the nearest are 16 and 20"),
    ({"height": 0}, r"height=0: a whole number from 4 to 4096"),
    ({"height": -16}, r"height=-16: a whole number from 4 to 4096"),
    ({"width": 4100}, r"width=4100: a whole number from 4 to 4096"),
    ({"width": 24.0}, r"width=24\.0: a whole number"),
    ({"fps": 0}, r"fps=0: a whole number from 1 to 240"),
    ({"fps": 241}, r"fps=241: a whole number from 1 to 240"),
    ({"fps": 7.5}, r"fps=7\.5: a whole number"),
    ({"motion": math.nan}, r"motion=nan: one number, 3 \(one per pair of frames\) or 4 \(one per frame\)"),
    ({"motion": -1}, r"motion=-1: one number"),
    ({"motion": "60"}, r"motion='60': one number"),
    ({"motion": True}, r"motion=True: one number"),
    ({"motion": 1j}, r"motion=1j: one number"),
    ({"motion": 1e39}, r"motion=1e\+39: one number"),
    ({"motion": [60] * 2}, r"motion has shape \[2\]: one number, 3 .* or 4"),
    ({"motion": [60] * 5}, r"motion has shape \[5\]: one number, 3 .* or 4"),
    ({"motion": []}, r"motion.*: one number"),
    ({"motion": [60, 60, math.inf]}, r"motion=\[60, 60, inf\]: one number"),
    ({"motion": [60, 60, -60]}, r"motion=\[60, 60, -60\]: one number"),
    ({"motion": [60, 60, "x"]}, r"motion=\[60, 60, 'x'\]: one number"),
    ({"motion": [[60, 60], [60]]}, r"motion=\[\[60, 60\], \[60\]\]: one number"),
    ({"motion": np.ones((4, 4))}, r"motion has shape \[4, 4\]: one number"),
    ({"motion": "unspecified"}, r"motion='unspecified': tiny was not trained without it; its default is 60\.0"),
    (
        {"appearance": math.inf},
        r"appearance=inf: one number, 4 numbers, or a matrix \[4, 32\] or \[4, 4\], each finite",
    ),
    ({"appearance": "1"}, r"appearance='1': one number"),
    ({"appearance": False}, r"appearance=False: one number"),
    ({"appearance": -1e300}, r"appearance=-1e\+300: one number"),
    ({"appearance": [1.0] * 3}, r"appearance has shape \[3\]: one number, 4 numbers"),
    ({"appearance": np.ones((4, 31))}, r"appearance has shape \[4, 31\]: one number"),
    ({"appearance": np.ones((32, 4))}, r"appearance has shape \[32, 4\]: one number"),
    ({"appearance": np.full((4, 32), np.nan)}, r"appearance=array"),
    ({"appearance": np.ones((1, 4, 4))}, r"appearance has shape \[1, 4, 4\]: one number"),
    ({"appearance": "unspecified"}, r"appearance='unspecified': tiny was not trained without it; its default is 1\.0"),
    ({"offset_noise": -0.1}, r"offset_noise=-0\.1: a number from 0"),
    ({"offset_noise": math.nan}, r"offset_noise=nan: a number from 0"),
    ({"offset_noise": [0.1]}, r"offset_noise=\[0\.1\]: a number from 0"),
    ({"offset_noise": "unspecified"}, r"offset_noise='unspecified': tiny was not trained without it"),
    ({"guidance": [[1.0], [1.0, 2.0]]}, r"guidance has 2 numbers: a finite number, 0 or more, or one per frame \(4\)"),
    ({"guidance": [1.0, [1.0, -2.0, 1.0, 1.0]]}, r"guidance=\[1\.0, -2\.0, 1\.0, 1\.0\]: a finite number"),
    ({"guidance": [1.0, [[1.0]]]}, r"guidance=\[\[1\.0\]\]: a finite number"),
    ({"motoin": 60}, r"motoin: unknown; a request takes prompt, negative_prompt, seed, .*, fps, motion, appearance,"),
    ({"steps": "random"}, r"steps='random': a whole number"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options)[:50] for options, _ in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        request(**options)


def test_the_error_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        request(steps=0)
    assert issubclass(RequestError, HigenError)


def test_the_length_of_a_cue_follows_the_frames() -> None:
    assert request(frames=8, motion=[60] * 7).controls["motion"].tolist() == [60] * 7
    assert request(frames=8, motion=[60] * 8).controls["motion"].tolist() == [60] * 8
    with pytest.raises(RequestError, match="one number, 7"):
        request(frames=8, motion=[60] * 3)


def test_a_model_trained_without_its_cues_takes_the_word_unspecified() -> None:
    made = request(manifest=FREE, motion="unspecified", appearance="unspecified")
    assert made.controls["motion"] is None
    assert made.controls["appearance"] is None
    assert request(manifest=FREE).controls["motion"] == 60.0
    none = spec.manifest(replace(TINY, optional_cues=True, defaults=replace(TINY.defaults, motion=None)))
    assert request(manifest=none).controls["motion"] is None


def test_sizes_are_multiples_of_the_autoencoder_and_the_network_together() -> None:
    wide = spec.manifest(
        replace(TINY, autoencoder=replace(TINY.autoencoder, factor=8), defaults=replace(TINY.defaults, width=32))
    )
    assert request(manifest=wide, height=16, width=32).width == 32
    with pytest.raises(RequestError, match="width=24: a multiple of 16; the nearest are 16 and 32"):
        request(manifest=wide, height=16, width=24)


# Loops


def test_guidance_per_frame() -> None:
    made = request(frames=3, guidance=[2.0, [1.0, 1.5, 4.0]])
    assert made.guidance == (2.0, (1.0, 1.5, 4.0))
    assert request(frames=2, guidance=[[1.5], [3, 4]]).guidance == ((1.5,), (3.0, 4.0))
    assert request(frames=1, guidance=np.array([[3], [4]])).guidance == ((3.0,), (4.0,))
    with pytest.raises(RequestError, match=r"guidance has 3 numbers: .* one per frame \(5\)"):
        request(frames=5, guidance=[2.0, [1.0, 1.5, 4.0]])


@pytest.mark.parametrize(("frames", "scales"), [(2, [1, 3]), (3, [1, 2, 3]), (5, [1, 1.5, 2, 2.5, 3]), (24, None)])
def test_a_models_list_of_guidance_is_spread_over_the_frames(frames: int, scales: list[float] | None) -> None:
    draft, film = request(manifest=MANIFEST, frames=frames).guidance
    assert draft == 2.0
    np.testing.assert_allclose(film, np.linspace(1, 3, frames) if scales is None else scales)


def test_a_loop_without_guidance_takes_only_one() -> None:
    lone = changed(MANIFEST, "draft", guided=None, guidance=1.0)
    assert request(manifest=lone).guidance[0] == 1.0
    assert request(manifest=lone, guidance=[1, 2.0]).guidance == (1.0, 2.0)
    with pytest.raises(RequestError, match=r"guidance=2: the loop draft has no guidance; 1 is allowed"):
        request(manifest=lone, guidance=2)


def test_steps_are_those_that_the_solver_has() -> None:
    assert request(manifest=MANIFEST, solver="lcm", steps=20).steps == (20, 20)
    with pytest.raises(RequestError, match="steps=21: a whole number from 1 to 20"):
        request(manifest=MANIFEST, solver=["ddim", "lcm"], steps=[100, 21])
    with pytest.raises(RequestError, match="steps=101: a whole number from 1 to 100"):
        request(manifest=MANIFEST, steps=101)


def test_which_loops_run() -> None:
    draft, film = MANIFEST.loops
    one, several = request(manifest=MANIFEST, frames=1), request(manifest=MANIFEST, frames=4)
    assert [one.runs(draft), one.runs(film), several.runs(draft), several.runs(film)] == [True, False, True, True]
    assert (several.frames_of(draft), several.frames_of(film)) == (1, 4)
    black = np.zeros((8, 12, 3), np.uint8)
    drawn = request(manifest=MANIFEST, sketch=black)
    assert (drawn.replaces(draft), drawn.runs(draft), drawn.stand_ins(draft)) == (True, False, ("look",))
    begun = request(manifest=MANIFEST, footage=np.stack([black] * 5))
    assert (begun.begins(film), begun.runs(film), begun.stand_ins(film)) == (True, True, ("watch",))
    assert (begun.begins(draft), begun.stand_ins(draft)) == (False, ())
    assert begun.number("control:push") == 0.5
    assert begun.number(3) == 3.0


# Controls


WRONG_CONTROLS = [
    ({"shake": 2.5}, r"shake=2\.5: one number, 4 .* or 5 \(one per frame\), each finite and >= -2 and <= 2"),
    ({"shake": [0, 0, 0, -3]}, r"shake=\[0, 0, 0, -3\]: one number"),
    ({"shake": "unspecified"}, r"shake='unspecified': tables alone was not trained without it"),
    ({"grain": 2.5}, r"grain=2\.5: a whole number from 0 to 9"),
    ({"grain": 10}, r"grain=10: a whole number from 0 to 9"),
    ({"grain": True}, r"grain=True: a whole number"),
    ({"grain": math.nan}, r"grain=nan: a whole number"),
    ({"grain": 10**400}, r"grain=1000+\.\.\.0+: a whole number"),
    ({"grain": "3"}, r"grain='3': a whole number"),
    ({"glow": -1}, r"glow=-1: a number from 0"),
    ({"glow": 1e39}, r"glow=1e\+39: a number from 0"),
    ({"glow": [1.0]}, r"glow=\[1\.0\]: a number from 0"),
    ({"mood": "Dark"}, r"mood='Dark': one of 'bright', 'dim', 'dark'"),
    ({"mood": 1}, r"mood=1: one of"),
    ({"mood": "unspecified"}, r"mood='unspecified': one of"),
    ({"push": 1.5}, r"push=1\.5: a number from 0 to 1"),
    ({"sketch": 7}, r"sketch is a int: a path, a PIL image or a uint8 array"),
    ({"sketch": "nowhere.png"}, r"sketch='nowhere\.png': cannot be read"),
    (
        {"sketch": [np.zeros((8, 12, 3), np.uint8)] * 2},
        r"sketch has 2 entries: one picture, or one per prompt \(1\)",
    ),
    ({"footage": np.zeros((8, 12, 3), np.uint8)}, r"footage is .*: a video file, a Video or uint8 frames"),
    ({"footage": np.zeros((4, 8, 12, 3), np.uint8)}, r"footage has 4 frames: the request has 5"),
    ({"footage": "nowhere.mp4"}, r"footage.*nowhere\.mp4"),
    ({"footage": [np.zeros((5, 8, 12, 3), np.uint8)]}, r"footage is a list: a video file"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_CONTROLS, ids=[message[:30] for _, message in WRONG_CONTROLS])
def test_a_wrong_control_is_named_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        request(manifest=MANIFEST, **options)


def test_controls_of_every_kind() -> None:
    made = request(
        ["a", "b"],
        manifest=MANIFEST,
        shake=[1, 0, -1, 0],
        sway="unspecified",
        drift=np.eye(5),
        grain=np.int8(7),
        glow=2,
        mood="dark",
        sketch=[np.full((8, 12, 3), shade, np.uint8) for shade in (0, 255)],
        footage=np.zeros((6, 16, 24, 3), np.uint8),
    ).controls
    assert made["shake"].tolist() == [1, 0, -1, 0]
    assert made["sway"] is None
    np.testing.assert_array_equal(made["drift"], np.eye(5))
    assert (made["grain"], type(made["grain"])) == (7, int)
    assert (made["glow"], type(made["glow"])) == (2.0, float)
    assert made["mood"] == "dark"
    black, white = made["sketch"]
    assert black.pixels.shape == (3, 8, 12)
    assert (black.pixels == -1).all()
    assert (white.pixels == 1).all()
    assert black.digest != white.digest
    assert [clip.pixels.shape for clip in made["footage"]] == [(3, 5, 8, 12)] * 2  # of a longer clip, the first frames


def test_pictures_are_read_once_per_prompt_at_most() -> None:
    read: list[Any] = []

    def load(control: Control, value: Any, frames: int, width: int, height: int) -> Picture:
        read.append((control.name, value, frames, width, height))
        return Picture(np.zeros((3, height, width), np.float32), b"")

    controls = {"sketch": "a.png"}
    make_request(MANIFEST, ["a", "b"], controls=controls, load=load, frames=3, width=16, height=20)
    assert read == [("sketch", "a.png", 3, 16, 20)]


# Loops that run need their pictures


def test_a_picture_that_a_loop_cannot_do_without() -> None:
    lone = changed(changed(MANIFEST, "draft", replaced=None), "film_two", inputs=MANIFEST.stage("film_two").inputs)
    mixer = lone.stage("mixer")
    seeing = changed(lone, "mixer", inputs=(*mixer.inputs, replace(MANIFEST.stage("look").inputs[0], name="seen")))
    with pytest.raises(RequestError, match=r"^sketch: the loop draft needs one$"):
        request(manifest=seeing)
    request(manifest=seeing, sketch=np.zeros((8, 12, 3), np.uint8))


def test_a_further_picture_that_a_replacement_needs() -> None:
    """A start from a clip may need further pictures besides that clip."""
    both = changed(MANIFEST, "film", start=Start("footage", "look.seen", 0.5))
    clip = np.zeros((5, 8, 12, 3), np.uint8)
    with pytest.raises(RequestError, match=r"^sketch: the loop film needs one$"):
        request(manifest=both, footage=clip)
    request(manifest=both, footage=clip, sketch=clip[0])
    assert request(manifest=changed(MANIFEST, "film", replaced=Replaced("sketch", "look.seen")), sketch=clip[0])


def test_a_picture_that_the_decoder_needs() -> None:
    paint = MANIFEST.stage("paint")
    seen = replace(MANIFEST.stage("look").inputs[0], name="seen")
    with pytest.raises(RequestError, match=r"^sketch: the decoder needs one$"):
        request(manifest=changed(MANIFEST, "paint", inputs=(*paint.inputs, seen), batch=False))


def test_a_model_that_reads_no_text_takes_an_empty_prompt() -> None:
    words = replace(
        MANIFEST.stage("reader"),
        inputs=(replace(MANIFEST.stage("reader").inputs[0], source="noise:3", dtype="float32"),),
    )
    silent = replace(MANIFEST, text=None, stages=tuple(words if s.name == "reader" else s for s in MANIFEST.stages))
    assert request("", manifest=silent).prompts == ("",)
    with pytest.raises(RequestError, match="at least one word"):
        request("", manifest=MANIFEST)


def test_a_requests_own_warn_is_kept() -> None:
    told: list[Warning] = []
    made = request(warn=told.append)
    made.warn(UserWarning("x"))
    assert [str(warning) for warning in told] == ["x"]
    with pytest.warns(UserWarning, match="^y$"):
        request().warn(UserWarning("y"))


@pytest.mark.parametrize("options", [{"prompt": "a heart " + "\ud800" * 10**6}, {"seed": [1] * 10**6}])
def test_an_error_does_not_repeat_a_megabyte(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        request(**options)
    assert len(str(caught.value)) < 200


# Arrays, tensors and other number types


@pytest.mark.parametrize("wrap", [np.array, torch.tensor, lambda value: torch.tensor(value).share_memory_()])
def test_arrays_and_tensors_are_taken_for_numbers_and_lists(wrap: Callable[[Any], Any]) -> None:
    made = request(
        ["a whale", "a star"],
        seed=wrap([3, 5]),
        steps=wrap([2, 9]),
        guidance=[wrap(2.0), wrap([1.0, 2.0, 3.0, 4.0])],
        frames=wrap(4),
        width=wrap(8),
        motion=wrap([1.0, 2.0, 3.0]),
        offset_noise=wrap(0.5),
    )
    assert (made.seeds, made.steps, made.guidance) == ((3, 5), (2, 9), (2.0, (1.0, 2.0, 3.0, 4.0)))
    assert (made.frames, made.width, made.controls["offset_noise"]) == (4, 8, 0.5)
    assert made.controls["motion"].tolist() == [1.0, 2.0, 3.0]
    assert {type(n) for n in (*made.seeds, *made.steps, made.frames, made.width)} == {int}


def test_half_precision_and_lists_of_scalars_too() -> None:
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    assert request(motion=numbers).controls["motion"].tolist() == [1.0, 2.0, 3.0]
    assert request(motion=list(numbers)).controls["motion"].tolist() == [1.0, 2.0, 3.0]
    assert request(steps=[np.int8(2), torch.tensor(3)]).steps == (2, 3)
    assert request(np.array(["a whale", "a star"])).prompts == ("a whale", "a star")
    drawn = request(["a", "b"], seed=np.array([-1, 4])).seeds
    assert drawn[1] == 4
    assert 0 <= drawn[0] < 2**32


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": [True, 2.0]},
        {"guidance": torch.tensor([True, False])},
        {"motion": [1.0, False, 3.0]},
        {"motion": np.array([True] * 3)},
        {"appearance": [[True] * 4] * 4},
        {"offset_noise": np.bool_(True)},
        {"steps": [True, 2]},
        {"seed": torch.tensor(True)},
        {"frames": np.array(True)},
    ],
)
def test_a_truth_value_is_not_a_number(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"^{next(iter(options))}="):
        request(**options)


def test_pictures_one_per_prompt_are_a_list_or_an_array_of_them() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    for given_pictures in (pictures, list(pictures), tuple(pictures)):
        made = request(["a whale", "a star"], image=given_pictures).controls["image"]
        for one, pixels in zip(made, pictures, strict=True):
            np.testing.assert_allclose((one.pixels.transpose(1, 2, 0) + 1) * 127.5, pixels, atol=1e-3)
    with pytest.raises(RequestError, match=r"^image has 2 entries: one picture, or one per prompt \(1\)"):
        request(image=pictures)


def test_numbers_for_the_one_loop_of_a_model_are_its_curve() -> None:
    """Several numbers have only one possible meaning. A list in a list means the same."""
    film = replace(MANIFEST.loop("film"), least_frames=1, noise=NoiseRule(8), start=None, replaced=None)
    one_loop = replace(MANIFEST, loops=(film,), stages=tuple(without_loops(stage) for stage in MANIFEST.stages))
    numbers = [1.0, 2.0, 3.0, 4.0, 5.0]
    for given_numbers in (numbers, [numbers], np.array(numbers), np.array([numbers]), torch.tensor(numbers)):
        assert request(manifest=one_loop, guidance=given_numbers).guidance == ((1.0, 2.0, 3.0, 4.0, 5.0),)
    assert request(manifest=one_loop, guidance=[3.0]).guidance == (3.0,)
    with pytest.raises(RequestError, match=r"guidance has 2 numbers: .*one per frame \(5\)"):
        request(manifest=one_loop, guidance=[1.0, 2.0])


def without_loops(stage: Stage) -> Stage:
    """A stage without inputs from loops."""
    names = {loop.name for loop in MANIFEST.loops}
    kept = [t for t in stage.inputs if t.source.partition(".")[0] not in names]
    return replace(stage, inputs=tuple(kept))


def test_a_warn_that_cannot_be_called_is_refused_before_it_is_needed() -> None:
    with pytest.raises(RequestError, match=r"^warn='loudly': a function"):
        request(warn="loudly")


class Odd:
    """An object that has no working `repr` and no working `tolist`."""

    def tolist(self) -> None:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**5000), 2**64, 1e39, -0.0])
ARRAYS = st.lists(st.floats() | st.integers(-5, 50), max_size=6).flatmap(
    lambda values: st.sampled_from(
        [
            np.array(values),
            np.array([values]),
            np.array(values, dtype=object),
            np.array(values[0] if values else 3),
            torch.tensor([float(value) for value in values]),
            np.ma.masked_invalid(np.array(values, float)),
        ]
    )
)
OTHERS = st.sampled_from(
    [
        b"bytes",
        {"a": 1},
        {1, 2},
        Decimal("0.5"),
        Fraction(1, 2),
        1j,
        Odd(),
        object(),
        np.float16(1.5),
        np.int8(3),
        np.str_("ddim"),
        np.datetime64("2024-01-01"),
        range(3),
        torch.device("cpu"),
        torch.empty(2, device="meta"),
        [[[[[[1]]]]]],
        "unspecified",
        "random",
        "x" * 200_000,
        "\ud800",
        ["a", "b"],
        float,
    ]
)
ANYTHING = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=5)
    | st.lists(NUMBERS | st.none() | st.text(max_size=2) | ARRAYS | OTHERS, max_size=5)
    | ARRAYS
    | OTHERS
)
OPTIONS = sorted({*COMMON, *(c.name for m in (HIGEN, MANIFEST) for c in m.controls)})


@settings(deadline=None, max_examples=600, derandomize=True)
@given(
    options=st.dictionaries(st.sampled_from(OPTIONS), ANYTHING, max_size=3), manifest=st.sampled_from([HIGEN, MANIFEST])
)
def test_any_request_is_good_or_a_request_error(options: dict[str, Any], manifest: Manifest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = request(manifest=manifest, **options)
        except RequestError as error:
            said = str(error)
        else:
            said = ""
    if said:
        assert len(said) < 1000
        assert "\n" not in said
        return
    for control in manifest.controls:
        value = made.controls[control.name]
        if control.kind == "curve" and control.encoding == "similarity":
            assert np.isfinite(similarity_rows(control.name, value, made.frames, 32)).all()
        elif control.kind == "curve" and value is not None:
            assert np.isfinite(curve_values(control.name, value, made.frames)).all()
    assert all(1 <= steps <= 1000 for steps in made.steps)
    assert made.width % 4 == made.height % 4 == 0
