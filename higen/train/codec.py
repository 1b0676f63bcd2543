"""Trains an autoencoder as a TOML file says (section [codec]), and writes a model directory.

A step decodes noisy latents of pictures and of frames of clips; `codec_loss` defines the loss. The model directory
contains the autoencoder, the scale of its latents measured on the data set, and the other networks. The other networks
are those of model.init; with model.architecture, an untrained denoiser and the text encoder of its companions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from higen.bundle import create_model
from higen.errors import SettingsError
from higen.families.higen import spec
from higen.measures.fidelity import psnr
from higen.models.companion_stages import EncoderStage
from higen.models.weights import write_safetensors
from higen.tokenizer import write_tokenizer
from higen.train.batches import generator
from higen.train.codec_loss import picture_loss, prior_loss
from higen.train.data import IMAGE, VIDEO, explained, list_items
from higen.train.file_source import make_reader
from higen.train.held_out import held_out_reader, swap
from higen.train.latents import to_pixels
from higen.train.loop import Periodic, Say
from higen.train.networks import Networks, build
from higen.train.notices import codec_psnr, slow_bfloat16
from higen.train.processes import Processes, shares, start_processes
from higen.train.reader import Reader
from higen.train.runs import Run, identity_of
from higen.train.settings import CodecSettings, CueSettings, ObjectiveSettings, Settings

__all__ = ["CodecBatch", "CodecObjective", "CodecSource", "CodecTrainer"]

KINDS = ("AutoencoderKL", "AutoencoderDC")
"""Autoencoders of single pictures."""
MEASURED = 16
"""The scale of the latents is measured on the pictures of this many steps."""
LEAST = 1e-3
"""Smallest deviation of a channel. It keeps the scales finite."""


@dataclass(frozen=True)
class CodecBatch:
    """pixels [n,3,Y,X] from -1 to 1; noise [n,C,y,x] for the latents; level [n,1,1,1], the deviation of the noise."""

    pixels: Tensor
    noise: Tensor
    level: Tensor

    def split(self, parts: int) -> list[CodecBatch]:
        """The samples in `parts` batches of the same size."""
        columns = (column.chunk(parts) for column in (self.pixels, self.noise, self.level))
        return [CodecBatch(*rows) for rows in zip(*columns, strict=True)]


class CodecSource:
    """The batches of a run: a process's share of each step's pictures, and some frames from each clip of its share."""

    def __init__(
        self, reader: Reader, codec: CodecSettings, share: Mapping[int, range], latent: tuple[int, int], seed: int
    ) -> None:
        """`latent`: channels of the latents, and pixels per latent cell in each direction."""
        self.reader, self.codec, self.share, self.latent, self.seed = reader, codec, share, latent, seed

    def batch(self, step: int) -> CodecBatch:
        """The batch of step `step`, on the host."""
        channels, factor = self.latent
        rows = []
        for kind in (IMAGE, VIDEO):
            indices = self.share[kind]
            for clip, index in zip(self.reader.pixels(kind, step, indices), indices, strict=True):
                random = generator(self.seed, kind, step, index)
                chosen = torch.randint(len(clip), (self.codec.frames if kind == VIDEO else 1,), generator=random)
                pixels = to_pixels(clip[chosen.numpy()])
                level = torch.rand((len(pixels), 1, 1, 1), generator=random) * self.codec.noise
                size = (len(pixels), channels, pixels.shape[2] // factor, pixels.shape[3] // factor)
                rows.append((pixels, torch.randn(size, generator=random), level))
        return CodecBatch(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.close()


class CodecObjective(nn.Module):
    """The loss of a step. The scale of the latents is that of `encoder` throughout the training."""

    def __init__(self, encoder: EncoderStage, settings: CodecSettings) -> None:
        super().__init__()
        self.autoencoder, self.settings = encoder.autoencoder, settings
        self.register_buffer("shift", encoder.shift.clone(), persistent=False)
        self.register_buffer("scale", encoder.scale.clone(), persistent=False)

    shift: Tensor
    scale: Tensor

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the scaled latents. The deviation is None if the autoencoder has no posterior."""
        posterior = self.autoencoder.encode(pixels, return_dict=False)[0]  # type: ignore[operator]
        if isinstance(posterior, Tensor):
            return (posterior.float() - self.shift) * self.scale, None
        return (posterior.mean.float() - self.shift) * self.scale, posterior.std.float() * self.scale.abs()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of scaled latents, from about -1 to 1."""
        decoded: Tensor = self.autoencoder.decode(latents / self.scale + self.shift, return_dict=False)[0]  # type: ignore[operator]
        return decoded.float()

    def forward(self, batch: CodecBatch) -> Tensor:
        """The loss of a batch, a single number."""
        own = self.settings
        with torch.set_grad_enabled(own.layers == "all"):
            mean, deviation = self.encode(batch.pixels)
        spread = batch.level if deviation is None else (batch.level.square() + deviation.square()).sqrt()
        decoded = self.decode(mean + spread * batch.noise)
        loss = picture_loss(decoded, batch.pixels, own.mse_weight, own.edge_weight, 1.0)
        return loss + own.prior_weight * prior_loss(mean) if own.layers == "all" else loss


class CodecGradients:
    """The gradients of a step (`higen.train.loop.Gradients`); its loss is "codec"."""

    def __init__(
        self, objective: CodecObjective, source: CodecSource, settings: Settings, processes: Processes
    ) -> None:
        self.source, self.settings, self.processes = source, settings, processes
        self.parallel = processes.prepare(objective)

    def __call__(self, step: int, random: torch.Generator) -> Mapping[str, Tensor]:
        """The loss of a step, the mean over this process's samples."""
        parts = self.source.batch(step).split(self.settings.run.micro_batches)
        device, bfloat16 = self.processes.device, self.settings.run.precision == "bf16"
        found = torch.zeros((), device=device)
        for i, part in enumerate(parts):
            here = CodecBatch(part.pixels.to(device), part.noise.to(device), part.level.to(device))
            with _exchanged(self.processes, self.parallel, last=i == len(parts) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = self.parallel(here)
                self.processes.backward(loss / len(parts))
            found = found + loss.detach() / len(parts)
        return {"codec": found}


@contextmanager
def _exchanged(processes: Processes, module: nn.Module, last: bool) -> Iterator[None]:
    """Processes exchange gradients only once per step, with its last part."""
    if last:
        yield
    else:
        with processes.waiting(module):
            yield


class CodecTrainer(Run):
    """The autoencoder, its averages, optimiser and data of a run, on this process's device."""

    def __init__(self, settings: Settings, say: Say = lambda _: None) -> None:
        """Raises SettingsError for settings, a data set or an autoencoder that cannot be used."""
        # Cues and captions are not used. Key frames need not count as pictures: clips contribute their frames anyway.
        bare = replace(settings.data, key_frames=False)
        self.settings, self.say, run = settings, say, settings.run
        self.listing = list_items(settings.data.path)
        self.networks = build(settings, (item.caption for item in self.listing.items))
        config = self.networks.config
        if config.autoencoder.kind not in KINDS:
            raise SettingsError(f"codec.layers: {config.autoencoder.kind} is not trained; one of {', '.join(KINDS)}")
        self.processes = start_processes(unused_parameters=False)
        self._reading = replace(settings, data=bare, cues=CueSettings(), objective=ObjectiveSettings())
        self.identity = identity_of(settings, self.networks, self.listing)
        device = self.processes.device
        self.networks.encoder.to(device)
        reader = make_reader(self._reading, self.networks, self.listing, None, device)
        self.reader, self.source = reader, self._source(reader)
        self.objective = CodecObjective(self.networks.encoder, settings.codec).to(device)
        trained = dict(self.objective.named_parameters())
        if settings.codec.layers == "decoder":
            self.objective.requires_grad_(False)
            trained = {name: p for name, p in trained.items() if not _of_encoder(name)}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self._held_out = self._held_out_source() if run.held_out_every else None
        gradients = CodecGradients(self.objective, self.source, settings, self.processes)
        self.loop = self.make_loop(gradients, trained, Periodic(run.held_out_every, self._measure))

    networks: Networks
    source: CodecSource

    def _source(self, reader: Reader) -> CodecSource:
        config, place = self.networks.config, (self.processes.count, self.processes.index)
        latent = config.unet.in_channels, config.autoencoder.factor
        return CodecSource(reader, self.settings.codec, shares(self._reading, *place), latent, self.settings.run.seed)

    def _held_out_source(self) -> CodecSource:
        _, reader = held_out_reader(self._reading, self.networks, self.processes, None)
        return self._source(reader)

    def warn(self) -> None:
        """Say which files are left out, and how well the initial codec reconstructs frames of this data set."""
        if self.listing.skipped:
            self.say(f"left out of the data set{explained(self.listing.skipped)}")
        on_host = self.processes.device.type == "cpu"
        if self.settings.run.precision == "bf16" and on_host and (line := slow_bfloat16("run.precision = 'fp32'")):
            self.say(line)
        if self.settings.model.init is not None:
            found = codec_psnr(self.networks.encoder, self.listing.items, self.reader.frame)
            if found is not None:
                self.say(f"the autoencoder to start from shows frames of this data set with a PSNR of {found:.1f} dB")

    def _measure(self) -> None:
        """Log the PSNR of the averaged weights on held-out frames, which are the same every time."""
        assert self._held_out is not None
        found: list[float] = []
        with self._averaged(), torch.no_grad():
            for step in range(self.settings.data.held_out_steps):
                pixels = self._held_out.batch(step).pixels
                shown = self.objective.decode(self.objective.encode(pixels.to(self.processes.device))[0]).cpu()
                found += [psnr(_levels(a), _levels(b)) for a, b in zip(shown, pixels, strict=True)]
        mean = float(self.processes.mean(torch.tensor(np.mean(found), device=self.processes.device)))
        if self.record is not None:
            self.record.log(self.loop.step, {"held-out PSNR": mean})
        self.tell(f"held-out PSNR {mean:.2f} dB")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside the block, the network has the averaged weights."""
        swap(self.optimiser.parameters, self.optimiser.average)
        try:
            yield
        finally:
            swap(self.optimiser.parameters, self.optimiser.average)

    def write(self, output: Path, overwrite: bool = False) -> None:
        """Write the averaged weights with the scale of their latents, and the other networks.

        Raises ModelError if the model directory cannot be written.
        """
        networks, weights = self.networks, self.settings.run.weights
        own = networks.own or networks.config
        average = {name: p.detach() for name, p in self.objective.named_parameters()} | self.optimiser.average
        if self.settings.codec.layers == "all":
            with self._averaged(), torch.no_grad():
                shift, scale = self._scale()
            own = replace(own, autoencoder=replace(own.autoencoder, shift=shift, scale=scale))
        source = networks.companions
        with create_model(output, spec.manifest(own), overwrite) as folder:
            write_safetensors(folder / spec.AUTOENCODER, {n.partition(".")[2]: t for n, t in average.items()}, weights)
            if self.settings.model.init is not None:
                shutil.copyfile(source.file(spec.UNET, verify=False), folder / spec.UNET)
            else:
                write_safetensors(folder / spec.UNET, networks.denoiser.state_dict(), weights)
            shutil.copyfile(source.file(spec.TEXT_ENCODER, verify=False), folder / spec.TEXT_ENCODER)
            write_tokenizer(networks.tokenizer.tokenizer, folder / spec.TOKENIZER)
        if self.settings.codec.layers == "all":
            self.say(
                f"{output}: its denoiser was not trained on these latents; train it next (model.init, or companions)"
            )

    def _scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Shift and scale that give the codec's latents mean 0 and deviation 1 on pictures of the data set."""
        means, squares = [], []
        for step in range(MEASURED):
            mean, deviation = self.objective.encode(self.source.batch(step).pixels.to(self.processes.device))
            raw = mean.double() / self.objective.scale + self.objective.shift
            spread = 0.0 if deviation is None else (deviation.double() / self.objective.scale).square()
            means.append(raw.mean(dim=(0, 2, 3)).cpu())
            squares.append((raw.square() + spread).mean(dim=(0, 2, 3)).cpu())
        shift = torch.stack(means).mean(dim=0)
        deviations = (torch.stack(squares).mean(dim=0) - shift.square()).clamp_min(LEAST**2).sqrt()
        return tuple(shift.tolist()), tuple((1 / deviations).tolist())


def _of_encoder(name: str) -> bool:
    """Whether a parameter of the objective belongs to the encoder, by its name in diffusers' autoencoders."""
    return name.startswith(("autoencoder.encoder.", "autoencoder.quant_conv."))


def _levels(picture: Tensor) -> np.ndarray:
    """A picture [3,Y,X] from -1 to 1 as uint8."""
    return np.rint((picture.clamp(-1, 1).numpy() + 1) * 127.5).astype(np.uint8)
