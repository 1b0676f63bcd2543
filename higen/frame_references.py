"""Checks the inputs of stages that take frames of the request by their index."""

from __future__ import annotations

from higen.rows import Rows
from higen.stages import Tensor, source
from higen.tables import check

__all__ = ["check_frames_source", "check_known_source", "check_placed", "of_kind"]


def of_kind(manifest: Rows, *kinds: str) -> list[str]:
    """The names of the controls of these kinds."""
    return [control.name for control in manifest.controls if control.kind in kinds]


def check_known_source(where: str, tensor: Tensor) -> None:
    """Check an input that takes known frames. Their control is that of the stage's loop (`_check_loop`)."""
    latents = source(tensor.source).name == "latents"
    good = len(tensor.shape) == 5 and (tensor.shape[0], *tensor.shape[2:]) == ("B", "F", "H", "W")
    good = good and (latents or tensor.shape[1] == 1)
    good = good or (not latents and tensor.shape == ("B", "F"))
    wanted = "[B, C, F, H, W]" if latents else "[B, F] or [B, 1, F, H, W]"
    check(good and tensor.dtype == "float32", f"{where}: {tensor.source} is float32 {wanted}, not {list(tensor.shape)}")


def check_frames_source(manifest: Rows, where: str, tensor: Tensor) -> None:
    """Check an input that takes the pictures of a control of kind frames at their places, or these places."""
    found, shape = source(tensor.source), list(tensor.shape)
    names = of_kind(manifest, "frames")
    check(found.name in names, f"{where}: source {tensor.source}: the controls of kind frames are {names}")
    places = found.kind == "places"
    good = shape == ["B", "F"] if places else len(shape) == 5 and (shape[0], *shape[2:]) == ("B", "F", "Y", "X")
    good = (
        good
        and (places or manifest.fixed.get(str(tensor.shape[1]), tensor.shape[1]) == 3)
        and tensor.dtype == "float32"
    )
    wanted = "[B, F]" if places else "[B, 3, F, Y, X]"
    check(good, f"{where}: {tensor.source} is float32 {wanted}, not {shape}")


def check_placed(manifest: Rows, where: str, tensor: Tensor) -> None:
    """Check an input that takes what a stage made of the pictures of a control, if the control is of kind frames."""
    if source(tensor.source).given in of_kind(manifest, "frames"):
        good = len(tensor.shape) == 5 and (tensor.shape[0], *tensor.shape[2:]) == ("B", "F", "H", "W")
        check(good, f"{where}: {tensor.source} is [B, C, F, H, W], not {list(tensor.shape)}")
