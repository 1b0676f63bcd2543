"""Targets and precisions of engines."""

from __future__ import annotations

import re

import pytest

from higen.engines.targets import RTX, Target, check_precision, parse_targets
from higen.errors import RequestError


def test_a_list_of_targets_is_read_in_order_and_each_once() -> None:
    assert parse_targets("rtx-sm89, rtx-sm120,rtx-sm89") == [
        Target("rtx-sm89", "rtx", (89,)),
        Target("rtx-sm120", "rtx", (120,)),
    ]


def test_rtx_is_one_portable_plan_and_tensorrt_is_the_gpu_here() -> None:
    assert parse_targets("rtx") == [Target("rtx", "rtx", (80, 86, 89, 120))]
    assert parse_targets("tensorrt") == [Target("tensorrt", "tensorrt", ())]


@pytest.mark.parametrize("name", ["", "rtx-sm90", "rtx-89", "cuda", "rtx-sm89;rtx-sm86", "RTX", "rtx-sm89,"])
def test_an_unknown_target_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"of rtx-sm75, .*rtx-sm121, rtx, tensorrt"):
        parse_targets(name)


def test_the_error_for_hopper_names_the_right_target() -> None:
    with pytest.raises(RequestError, match="take 'tensorrt', on the machine itself"):
        parse_targets("rtx-sm90")


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [  # NVIDIA's support matrix of TensorRT for RTX 1.5
        ("fp32", RTX),
        ("fp16", RTX),
        ("bf16", (80, 86, 89, 120, 121)),
        ("int8", (80, 86, 89, 120, 121)),
        ("fp8.fp16", (89, 120, 121)),
        ("nvfp4.fp16", (120, 121)),
    ],
)
def test_each_architecture_computes_in_what_nvidia_says(precision: str, allowed: tuple[int, ...]) -> None:
    for architecture in RTX:
        if architecture in allowed:
            check_precision(precision, (architecture,))
        else:
            with pytest.raises(RequestError, match=f"{precision}.*SM{architecture} cannot"):
                check_precision(precision, (architecture,))


def test_a_portable_plan_needs_every_architecture() -> None:
    with pytest.raises(RequestError, match=r"'fp8.fp16': SM80, SM86 cannot compute in it; the first that can is SM89"):
        check_precision("fp8.fp16", parse_targets("rtx")[0].architectures)


@pytest.mark.parametrize("precision", ["int3", "FP16", "fp8", "nvfp4"])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    """The error lists only allowed precisions. Plain fp8 is not one of them."""
    with pytest.raises(RequestError, match=f"precision='{precision}': one of ") as caught:
        check_precision(precision, (120,))
    for allowed in re.findall("'([^']+)'", str(caught.value).partition(": ")[2]):
        check_precision(allowed, (120,))
