"""Checks the stages that turn latents into pixels (docs/manifest.md, `sizes`)."""

from __future__ import annotations

from higen.rows import Rows
from higen.tables import check

__all__ = ["check_decoders"]


def check_decoders(manifest: Rows) -> None:
    """Raise ManifestError for a decoder, or a decoder of previews, that does not have the shapes of one."""
    channels = _channels(manifest, manifest.sizes.decoder, "sizes.decoder")
    row = manifest.sizes.preview
    if row is None:
        return
    own = _channels(manifest, row.decoder, "sizes.preview.decoder")
    where = f"sizes.preview.decoder={row.decoder!r}"
    check(row.decoder != manifest.sizes.decoder, f"{where}: another stage than sizes.decoder")
    check(own == channels, f"{where}: its latents have {own} channels, but those of sizes.decoder have {channels}")
    check(len(manifest.stage(row.decoder).inputs) == 1, f"{where}: no other input than the latents")
    choices = {control.name: control for control in manifest.controls if control.kind == "choice"}
    check(
        row.control in choices, f"sizes.preview.control={row.control!r}: the controls of kind choice are {[*choices]}"
    )
    control = choices[row.control]
    others = [choice for choice in control.choices if choice != control.default]
    check(row.choice in others, f"sizes.preview.choice={row.choice!r}: one of {others}, and not the default")


def _channels(manifest: Rows, name: str, key: str) -> int:
    """The channels of a decoder's latents."""
    where = f"{key}={name!r}"
    check(name in manifest.stage_names, f"{where}: the stages are {', '.join(manifest.stage_names)}")
    decoder = manifest.stage(name)
    given = [t for t in decoder.inputs if t.source == "state"]
    shapes = [(t.shape, made.shape) for t in given for made in decoder.outputs]
    sizes = [axis if isinstance(axis, int) else manifest.fixed.get(axis) for shape, _ in shapes for axis in shape[1:2]]
    good = len(shapes) == 1 and any(
        (*shape[:1], *shape[2:]) == axes and made == pixels
        for shape, made in shapes
        for axes, pixels in ((("N", "H", "W"), ("N", 3, "Y", "X")), (("B", "F", "H", "W"), ("B", 3, "F", "Y", "X")))
    )
    wanted = "[N, C, H, W] and the output [N, 3, Y, X], or [B, C, F, H, W] and [B, 3, F, Y, X]"
    size = sizes[0] if good else None
    check(size is not None, f"{where}: one input with the source state, {wanted}, C of a fixed size")
    assert size is not None
    return size
