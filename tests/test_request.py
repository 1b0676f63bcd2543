"""Requests: what is not given is the model's default; what is wrong is one RequestError that names it."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from higen.errors import HigenError, RequestError
from higen.request import MAX_SEED, Request, RequestOptions, make_request

FREE = replace(TINY, optional_cues=True)
"""The tiny model (4 frames of 24x16, sizes in multiples of 4), trained without its cues as well."""


def request(prompt: Any = "a whale", **options: Any) -> Request:
    return make_request(TINY, prompt, **options)


def test_what_is_not_given_is_the_models_default() -> None:
    made = request()
    assert made == Request(
        prompts=("a whale",),
        negative_prompt="",
        seeds=(0,),
        steps=(4, 4),
        guidance=(3.0, 3.0),
        solver="ddim",
        frames=4,
        height=16,
        width=24,
        fps=8,
        motion=60.0,
        appearance=1.0,
        offset_noise=0.1,
    )


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
    assert (made.solver, made.frames, made.height, made.width, made.fps) == ("dpm++2m", 1, 4096, 4, 240)
    assert (made.motion, made.appearance, made.offset_noise) == (0, -1.0, 0.0)


def test_one_value_serves_both_stages_and_all_prompts() -> None:
    made = request(("a whale", "a star"), seed=5, steps=7, guidance=2)
    assert made.seeds == (5, 5)
    assert made.steps == (7, 7)
    assert made.guidance == (2.0, 2.0)


def test_numbers_of_numpy_become_pythons() -> None:
    made = request(
        seed=np.uint64(MAX_SEED), steps=np.int32(3), guidance=np.float32(1.5), frames=np.int64(2), width=np.int16(8),
        offset_noise=np.float64(0.5),
    )  # fmt: skip
    values = (*made.seeds, *made.steps, *made.guidance, made.frames, made.width, made.offset_noise)
    assert values == (MAX_SEED, 3, 3, 1.5, 1.5, 2, 8, 0.5)
    assert {type(value) for value in values} == {int, float}


def test_zero_is_a_value_and_not_a_missing_one() -> None:
    made = request(seed=0, guidance=0, motion=0, appearance=0, offset_noise=0)
    assert (made.guidance, made.motion, made.appearance, made.offset_noise) == ((0.0, 0.0), 0, 0, 0.0)


WRONG = [
    # The value and what is allowed are both in the message.
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
    ({"negative_prompt": None}, r"negative_prompt=None: a string"),
    ({"negative_prompt": ["text"]}, r"negative_prompt=\['text'\]: a string"),
    ({"negative_prompt": "\udfff"}, r"negative_prompt='\\udfff': not valid Unicode"),
    ({"seed": -1}, rf"seed=-1: a whole number from 0 to {MAX_SEED}"),
    ({"seed": MAX_SEED + 1}, rf"seed={MAX_SEED + 1}: a whole number from 0 to"),
    ({"seed": 1.0}, r"seed=1\.0: a whole number"),
    ({"seed": True}, r"seed=True: a whole number"),
    ({"seed": np.True_}, r"seed=np\.True_: a whole number"),
    ({"seed": "1"}, r"seed='1': a whole number"),
    ({"seed": None}, r"seed=None: a whole number"),
    ({"seed": [1, 2]}, r"seed has 2 entries: one number, or one per prompt \(1\)"),
    ({"seed": []}, r"seed has 0 entries"),
    ({"seed": [True]}, r"seed=True: a whole number"),
    ({"steps": 0}, r"steps=0: a whole number from 1 to 1000"),
    ({"steps": 1001}, r"steps=1001: a whole number from 1 to 1000"),
    ({"steps": -5}, r"steps=-5: a whole number"),
    ({"steps": 2.0}, r"steps=2\.0: a whole number"),
    ({"steps": True}, r"steps=True: a whole number"),
    ({"steps": [4]}, r"steps=\[4\]: one value, or two \(spatial stage, temporal stage\)"),
    ({"steps": [4, 4, 4]}, r"steps=\[4, 4, 4\]: one value, or two"),
    ({"steps": [4, 0]}, r"steps=0: a whole number"),
    ({"steps": "4"}, r"steps='4': a whole number"),
    ({"guidance": math.nan}, r"guidance=nan: a finite number, 0 or more"),
    ({"guidance": math.inf}, r"guidance=inf: a finite number"),
    ({"guidance": -0.5}, r"guidance=-0\.5: a finite number, 0 or more"),
    ({"guidance": 10**400}, r"guidance=1000+: a finite number"),
    ({"guidance": 1e39}, r"guidance=1e\+39: a finite number"),
    ({"guidance": True}, r"guidance=True: a finite number"),
    ({"guidance": "12"}, r"guidance='12': a finite number"),
    ({"guidance": [1.0, math.nan]}, r"guidance=nan: a finite number"),
    ({"guidance": [1.0, 2.0, 3.0]}, r"guidance=\[1\.0, 2\.0, 3\.0\]: one value, or two"),
    ({"solver": "euler"}, r"solver='euler': one of 'ddim', 'dpm\+\+2m'"),
    ({"solver": "DDIM"}, r"solver='DDIM': one of"),
    ({"solver": 1}, r"solver=1: one of"),
    ({"solver": ["ddim"]}, r"solver=\['ddim'\]: one of"),
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
    ({"motion": None}, r"motion=None: tiny was not trained without this cue; its default is 60\.0"),
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
    ({"appearance": None}, r"appearance=None: tiny was not trained without this cue; its default is 1\.0"),
    ({"offset_noise": -0.1}, r"offset_noise=-0\.1: a finite number, 0 or more"),
    ({"offset_noise": math.nan}, r"offset_noise=nan: a finite number"),
    ({"offset_noise": [0.1]}, r"offset_noise=\[0\.1\]: a finite number"),
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
    assert request(frames=8, motion=[60] * 7).motion == [60] * 7
    assert request(frames=8, motion=[60] * 8).motion == [60] * 8
    with pytest.raises(RequestError, match="one number, 7"):
        request(frames=8, motion=[60] * 3)


def test_a_model_trained_without_its_cues_takes_none() -> None:
    made = make_request(FREE, "a whale", motion=None, appearance=None)
    assert made.motion is None
    assert made.appearance is None
    assert not made.motion_input(32).any()
    assert made.appearance_input(32).min() == -1.0
    assert make_request(FREE, "a whale").motion == 60.0


def test_cues_are_the_same_for_every_sample() -> None:
    made = request(["a whale", "a star", "a heart"], motion=[10, 20, 30])
    motion, appearance = made.motion_input(32), made.appearance_input(32)
    assert motion.shape == (3, 4, 32)
    assert appearance.shape == (3, 4, 32)
    assert motion.dtype == appearance.dtype == np.float32
    assert (motion == motion[:1]).all()
    assert motion.flags.writeable


def test_sizes_are_multiples_of_the_autoencoder_and_the_network_together() -> None:
    wide = replace(TINY, autoencoder=replace(TINY.autoencoder, factor=8))
    assert make_request(wide, "a whale", height=16, width=32).width == 32
    with pytest.raises(RequestError, match="width=24: a multiple of 16; the nearest are 16 and 32"):
        make_request(wide, "a whale", height=16, width=24)


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(-5, 50) | st.floats() | st.none() | st.text(max_size=2), max_size=5)
)
OPTIONS = [name for name in Request.__annotations__ if name not in ("prompts", "seeds")]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(options=st.dictionaries(st.sampled_from(["prompt", "seed", *OPTIONS]), ANYTHING, max_size=3))
def test_any_request_is_good_or_a_request_error(options: dict[str, Any]) -> None:
    try:
        made = request(**options)
    except RequestError:
        return
    assert np.isfinite(made.motion_input(8)).all()
    assert np.isfinite(made.appearance_input(32)).all()
    assert all(1 <= steps <= 1000 for steps in made.steps)
    assert made.width % 4 == made.height % 4 == 0


def test_the_typed_options_are_those_that_are_taken() -> None:
    assert inspect.getfullargspec(make_request).kwonlyargs == list(RequestOptions.__annotations__)
