"""A plain reference for feature reuse: the U-Net computes everything; hooks put kept features into its last layer."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Reused"]


class Reused:
    """Hooks on a diffusers U-Net. Forward pass number n is a full step if `full(n)` is true."""

    def __init__(self, unet: Any, full: Any) -> None:
        self.count, self._full, self._kept = -1, full, torch.empty(0)
        self._width = unet.config.block_out_channels[0]
        self._hooks = [
            unet.register_forward_pre_hook(self._begins, with_kwargs=True),
            unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self._enters, with_kwargs=True),
        ]

    def _begins(self, *_: Any) -> None:
        self.count += 1

    def _enters(self, _: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        x, *more = given or (named.pop("input_tensor"),)
        if self._full(self.count):
            self._kept = x[:, : self._width].clone()
        return (torch.cat([self._kept, x[:, self._width :]], dim=1), *more), named

    def __enter__(self) -> Reused:
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
