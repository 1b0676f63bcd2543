"""Compares the network with the reference: whole forwards with every intermediate tensor, single modules, weights.

Frames are folded into the batch here, but only in some fixtures. For a stored [B,C,F,H,W], higen's tensor is unfolded.
For one frame the network without temporal layers runs, so a temporal module is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higen.errors import FixtureError, RequestError
from higen.families.higen.cues import motion_cue
from higen.families.higen.reference_names import module_paths, reference_names
from higen.families.higen.spec import UNetConfig
from higen.families.higen.unet import Denoiser, UNet
from higen.parity.compare import Difference, compare, refuse_unknown
from higen.parity.fixtures import entry, take

__all__ = ["Network", "forward", "motion_input", "unit", "weights"]


class Network:
    """A denoiser and its network without temporal layers, with access to modules by the reference's paths."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.config: UNetConfig = denoiser.config
        self.paths = module_paths(self.config)

    @cached_property
    def spatial(self) -> UNet:
        """The network for one frame, which shares the parameters."""
        return self.denoiser.spatial_unet()

    def unet(self, frames: int) -> UNet:
        """The network that runs for this many frames."""
        return self.spatial if frames == 1 else self.denoiser.unet

    def module(self, path: str, frames: int) -> nn.Module | None:
        """The module at a reference path, as it runs for `frames` frames; None if it does not run."""
        root, _, rest = self.paths[path].partition(".")
        where, _, leaf = rest.rpartition(".")
        start: nn.Module = self.unet(frames) if root == "unet" else self.denoiser.conditioner
        module: nn.Module | None = getattr(start.get_submodule(where), leaf)
        return module


def motion_input(motion: Tensor, frames: int, dim: int, where: str) -> Tensor:
    """The reference's `motion_cond` ([B] for one frame, else [B,F-1] or [B,F]) as higen's cue, float32 [B,F,dim]."""
    try:
        return torch.from_numpy(np.stack([motion_cue(row.numpy(), frames, dim) for row in motion.float()]))
    except RequestError as error:
        raise FixtureError(f"{where}: motion_cond: {error}") from error


def forward(network: Network, record: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> list[Difference]:
    """One call of the denoiser, with every intermediate tensor that is stored."""
    x, t, y, prior, motion, appearance = take(
        tensors, where, "x", "t", "y", "spat_prior", "motion_cond", "appearance_cond"
    )
    frames = x.shape[2]
    noise, noises = _noises(record, where)
    with torch.no_grad(), _recording(network, frames) as seen:
        context, embedding = network.denoiser.conditioner(
            y, motion_input(motion, frames, network.config.base_channels, where), appearance
        )
        out = network.unet(frames)(x, t, context, embedding, prior)
    seen |= {"context": context, "out": out, "out_f64": out}
    refuse_unknown(tensors, (*seen, *(f"block/{path}" for path in network.paths)), where)
    found = []
    for name, stored in tensors.items():
        path = name.removeprefix("block/")
        ours = seen[path]
        if ours.ndim == 4 and stored.ndim == 5:
            ours = _unfold(ours, frames)
        found.append(compare(name, ours, stored, noises.get(path, noise)))
    return found


def _unfold(x: Tensor, frames: int) -> Tensor:
    """[B*F,C,H,W] -> [B,C,F,H,W]."""
    return x.reshape(-1, frames, *x.shape[1:]).transpose(1, 2)


def _noises(record: Mapping[str, Any], where: str) -> tuple[float, Mapping[str, float]]:
    noise = entry(record, "fp32_vs_fp64_max_abs", float, where)
    return noise, record.get("blocks_fp32_vs_fp64_max_abs") or {}


@contextmanager
def _recording(network: Network, frames: int) -> Iterator[dict[str, Tensor]]:
    """Records, while the denoiser runs, each block's output by its reference path, and the embeddings by name.

    The output of a temporal module that does not run is its input, the output of the module before it.
    """
    seen: dict[str, Tensor] = {}
    unet = network.unet(frames)
    first = unet.get_submodule("encoder.0.blocks.0.resnet")

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    def entering(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["input_blocks.0"], seen["emb_sum"] = inputs[0], inputs[1]
        seen.setdefault("conv_in_plus_prior", inputs[0])  # if there is no temporal transformer between them

    modules = {path: network.module(path, frames) for path in network.paths}
    hooks = [module.register_forward_hook(keep(path)) for path, module in modules.items() if module is not None]
    hooks += [
        unet.time[-1].register_forward_hook(keep("time_emb")),
        network.denoiser.conditioner.motion.register_forward_hook(keep("motion_emb")),
        network.denoiser.conditioner.appearance.register_forward_hook(keep("appearance_emb")),
        first.register_forward_pre_hook(entering),
    ]
    if unet.temporal_in is not None:
        hooks.append(
            unet.temporal_in.register_forward_pre_hook(
                lambda module, inputs: seen.__setitem__("conv_in_plus_prior", inputs[0])
            )
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    for name in ("motion_emb", "appearance_emb"):
        seen[name] = seen[name].flatten(0, 1)  # [B,F,E] -> [B*F,E]
    for path, module in modules.items():
        if module is None:
            entry_path, _, index = path.rpartition(".")
            before = "conv_in_plus_prior" if path == "input_blocks.0.1" else f"{entry_path}.{int(index) - 1}"
            seen[path] = seen[before]


def unit(network: Network, record: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> list[Difference]:
    """A single module: `<module path>@<tag>`. fN in the tag is the number of frames of a residual block."""
    path, _, tag = where.rpartition("/")[2].partition("@")
    x, stored = take(tensors, where, "in0", "out")
    second = tensors.pop("in1", None)
    refuse_unknown(tensors, ("in0", "in1", "out"), where)
    frames = x.shape[2] if x.ndim == 5 else _frames_in_tag(tag)
    with torch.no_grad():
        folded = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x
        out = _run_module(network, path, folded, second, frames, where)
        if x.ndim == 5:
            out = _unfold(out, frames)
    noise, _ = _noises(record, where)
    return [compare("out", out, stored, noise)]


def _frames_in_tag(tag: str) -> int:
    last = tag.rpartition("f")[2]
    return int(last) if "f" in tag and last.isdigit() else 1


def _run_module(network: Network, path: str, x: Tensor, second: Tensor | None, frames: int, where: str) -> Tensor:
    """Run the module at a reference path on [B*F,C,H,W] images; the module of the context tokens runs on the text."""
    if path == "out":  # in higen the head is not a separate module
        unet = network.unet(frames)
        head: Tensor = unet.conv_out(F.silu(unet.norm_out(x)))
        return head
    refuse_unknown([path], (*network.paths, "out"), where)
    module, leaf = network.module(path, frames), network.paths[path].rpartition(".")[2]
    if module is None:
        return x
    arguments: list[Any] = [x]
    if leaf in ("resnet", "middle_out", "spatial"):
        if second is None:
            raise FixtureError(f"{where}: no tensor in1")
        arguments.append(second)
    if leaf in ("resnet", "middle_out", "temporal", "temporal_in"):
        arguments.append(frames)
    out: Tensor = module(*arguments)
    return out


def weights(network: Network, record: Mapping[str, Any], where: str) -> list[Difference]:
    """Checks that a model's weights are the recorded ones: their number, and the sums of some of them in float64."""
    names = {theirs: ours for ours, theirs in reference_names(network.config).items()}
    state = network.denoiser.state_dict()
    found = []
    for name, count in (("n_params", sum(p.numel() for p in state.values())), ("state_dict_keys", len(state))):
        if name in record:
            found.append(Difference(name, float(abs(count - entry(record, name, int, where))), 0.0))
    sums, firsts = record.get("key_sum_f64") or {}, record.get("key_first4") or {}
    refuse_unknown((*sums, *firsts), names, where)
    for key, total in sums.items():
        tensor = state[names[key]].double()
        found.append(Difference(key, abs(float(tensor.sum()) - total), 1e-12 * float(tensor.abs().sum())))
    for key, first in firsts.items():
        found.append(compare(key, state[names[key]].flatten()[: len(first)], torch.tensor(first), allowed=0.0))
    return found
