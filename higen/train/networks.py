"""The networks of a training run: loads or makes them, computes the objective, and writes the model directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from higen.bundle import Bundle, create_model
from higen.errors import ManifestError, SettingsError
from higen.families.higen import spec
from higen.families.higen.network import load_denoiser
from higen.families.higen.spec import ModelConfig, UNetConfig
from higen.families.higen.unet import Denoiser, Known, UNet
from higen.models.companion_stages import EncoderStage
from higen.models.companions import autoencoder, load_autoencoder, load_text_encoder, text_encoder
from higen.models.nestings import below
from higen.models.weights import write_safetensors
from higen.schedule import alphas_cumprod
from higen.text_files import TextError, read_json, read_toml
from higen.tokenizer import PromptTokenizer, build_word_tokenizer, write_tokenizer
from higen.train.batches import Batch, GainBatch
from higen.train.objective import gain_loss, residual_square, residual_v_loss, v_loss
from higen.train.settings import Settings
from higen.train.words import keep_words, with_words, words_of

__all__ = [
    "Networks",
    "Objective",
    "Trainable",
    "build",
    "new_denoiser",
    "read_architecture",
    "spatial_names",
]
__all__ += ["write_model"]

PROMPTS, SHORT = 8, 200
"""Largest number of captions that a trained model lists as its prompts, and their largest length in characters."""

_NOT_SPATIAL = ("time.", "prior.", "context_pool.")
"""Parts of the network without temporal layers that do not count as spatial, because a still-picture network does not
have them, or because they learn the cues.
"""


class Trainable(Protocol):
    """The networks that an objective needs."""

    @property
    def config(self) -> ModelConfig:
        """The configuration of the networks."""
        ...

    @property
    def denoiser(self) -> Denoiser:
        """Both U-Nets and the conditioner."""
        ...

    @property
    def text(self) -> nn.Module:
        """The text encoder."""
        ...


@dataclass(frozen=True)
class Networks:
    """What a run starts from.

    config      the networks' configuration; when fine-tuning, with the name of the model that training starts from
    companions  the model directory that the frozen networks come from
    own         the configuration to write, with the new model's own name; None: `config`
    notes       remarks for the user about the networks, one line each
    """

    config: ModelConfig
    denoiser: Denoiser
    text: nn.Module
    encoder: EncoderStage
    tokenizer: PromptTokenizer
    companions: Bundle
    own: ModelConfig | None = None
    notes: tuple[str, ...] = ()


def build(settings: Settings, captions: Iterable[str]) -> Networks:
    """The networks as the settings say, in float32 on the host. New weights depend only on the seed.

    Raises SettingsError (an architecture that does not fit its companions) and what opening a model directory raises.
    """
    source, captions = Bundle.open(settings.model.init or settings.model.companions or ""), list(captions)
    theirs = spec.config(source.manifest)
    config, tokenizer = theirs, None
    if settings.model.architecture is not None:
        config = read_architecture(Path(settings.model.architecture), theirs)
    if settings.model.tokenizer == "captions":
        words = words_of(captions)
        config = replace(config, text=with_words(config.text, len(words)))
        tokenizer = PromptTokenizer(build_word_tokenizer(words), config.text.rules)
    if settings.model.architecture is not None:
        _check_fit(config, theirs, new_text=tokenizer is not None, new_codec=settings.codec.layers != "none")
    config = replace(config, unet=_for_known(config.unet, settings))
    own = _named(config, theirs, settings)
    if settings.model.init is None:
        config = own
    torch.manual_seed(settings.run.seed)
    if settings.model.init is not None:
        denoiser = load_denoiser(source.file(spec.UNET), theirs.unet, torch.device("cpu"), torch.float32)
        if config.unet != theirs.unet:
            denoiser = _fitted(denoiser, config.unet)
    else:
        denoiser = new_denoiser(config.unet)
    notes: tuple[str, ...] = ()
    if theirs.unet.known_layers and not config.unet.known_layers and settings.model.init is not None:
        notes = (
            "the new model has no layers for known frames, because the layers beside them change; another run with "
            "model.known_frames = true and optimiser.layers = 'known' adds them",
        )
    if tokenizer is None:
        text: nn.Module = load_text_encoder(source.file(spec.TEXT_ENCODER), config.text.clip, torch.float32)
        tokenizer = PromptTokenizer.from_file(source.file(spec.TOKENIZER), config.text.rules)
    else:
        text = text_encoder(config.text.clip)
        if settings.model.init is not None:
            given = load_text_encoder(source.file(spec.TEXT_ENCODER), theirs.text.clip, torch.float32)
            before = PromptTokenizer.from_file(source.file(spec.TOKENIZER), theirs.text.rules).tokenizer
            notes = (*notes, keep_words(text, tokenizer.tokenizer, given, before, theirs.text.pad_id))
    kind, arguments = config.autoencoder.kind, config.autoencoder.arguments
    if settings.codec.layers != "none" and settings.model.init is None:
        codec = autoencoder(kind, arguments)
    else:
        codec = load_autoencoder(source.file(spec.AUTOENCODER), kind, arguments, torch.float32)
    own = replace(own, prompts=own.prompts or settings.run.sample_prompts or _some(captions, tokenizer))
    text.eval().requires_grad_(settings.optimiser.train_text)
    encoder = EncoderStage(codec, config.autoencoder.shift, config.autoencoder.scale).eval()
    return Networks(config, denoiser.requires_grad_(True), text, encoder, tokenizer, source, own, notes)


def read_architecture(file: Path, companions: ModelConfig) -> ModelConfig:
    """A ModelConfig from JSON or TOML. If they are left out, `text` and `autoencoder` are the companions', and name and
    licence are empty.
    """
    try:
        data = read_json(file) if file.suffix.lower() == ".json" else read_toml(file)
        if not isinstance(data, dict):
            raise ManifestError("an object is wanted")
        config = spec.read_config(data, file.name)
    except (OSError, TextError, ManifestError) as error:
        raise SettingsError(f"model.architecture={str(file)!r}: {error}") from error
    given = {name: getattr(companions, name) for name in ("text", "autoencoder") if name not in data}
    config = replace(config, **given)
    name, licence = (getattr(config, key) if key in data else "" for key in ("name", "licence"))
    return replace(config, name=name, licence=licence)


def _check_fit(config: ModelConfig, companions: ModelConfig, new_text: bool, new_codec: bool) -> None:
    channels = config.autoencoder.arguments.get("latent_channels", config.unet.in_channels)
    wanted = {
        "autoencoder": (config.autoencoder, config.autoencoder if new_codec else companions.autoencoder),
        "text": (config.text, config.text if new_text else companions.text),
        "unet.text_dim": (config.unet.text_dim, config.text.clip.get("hidden_size", config.unet.text_dim)),
        "unet.in_channels": (config.unet.in_channels, channels),
        "unet.out_channels": (config.unet.out_channels, channels),
    }
    for name, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise SettingsError(f"model.architecture: {name} is {ours}, but its companions have {theirs}")


def _named(config: ModelConfig, source: ModelConfig, settings: Settings) -> ModelConfig:
    """The configuration of a new model. It has its own name and licence and only the prompts of its architecture file.
    A licence that is not given names the model that training starts from. Only the architecture file can have a usual
    preset: those of the source were measured with other weights.
    """
    model, run = settings.model, settings.run
    given = config if model.architecture is not None else replace(config, name="", licence="", prompts=())
    mix = settings.objective.noise_mix
    defaults = config.defaults if mix is None else replace(config.defaults, noise_mix=mix)
    if model.architecture is None:
        defaults = replace(defaults, presets=tuple(replace(preset, usual=False) for preset in defaults.presets))
    came = "fine-tuned from" if model.init is not None else "not stated; with text encoder and autoencoder of"
    return replace(
        config,
        name=model.name or given.name or Path(run.output).name,
        licence=model.licence or given.licence or f"{came} {source.name} ({source.licence})",
        prompts=given.prompts,
        defaults=defaults,
    )


def _some(captions: Sequence[str], tokenizer: PromptTokenizer) -> tuple[str, ...]:
    """A few short captions from all over the data set that the tokenizer accepts without a warning."""
    short = [caption for caption in dict.fromkeys(captions) if 0 < len(caption) <= SHORT and "\n" not in caption]
    said: dict[str, list[Warning]] = {caption: [] for caption in short[:: max(-(-len(short) // PROMPTS), 1)]}
    for caption, warned in said.items():
        tokenizer.encode([caption], warned.append)
    return tuple(caption for caption, warned in said.items() if not warned)


def new_denoiser(config: UNetConfig) -> Denoiser:
    """A denoiser with random weights from the global generator."""
    denoiser = Denoiser(config)
    if config.prior_preconditioning:
        # The prior's convolution starts with the weights of the frames' convolution, not with zeros. Thus the prior has
        # an effect from the start.
        denoiser.unet.prior.load_state_dict(denoiser.unet.conv_in.state_dict())
    return denoiser


def _for_known(config: UNetConfig, settings: Settings) -> UNetConfig:
    """The network that the settings ask for. Layers of its own for known frames are kept only if nothing beside them
    changes. Raises SettingsError if they are to be trained and there are none, or the other way round.
    """
    own = settings.optimiser.layers == "known"
    if settings.objective.known and config.known_layers and not own and not settings.model.known_frames:
        raise SettingsError(
            f"objective.known={settings.objective.known}: the model draws clips with known frames with layers of their "
            "own; optimiser.layers = 'known' trains them"
        )
    if not own and settings.codec.layers == "none":
        config = replace(config, known_layers=False)
    if settings.model.known_frames and not config.takes_known:
        config = replace(config, known_layers=own, known_frames=not own)
    if own and not config.known_layers:
        raise SettingsError(
            "optimiser.layers='known': the model has no layers of its own for known frames; "
            + ("it was trained for them as a whole" if config.known_frames else "model.known_frames = true adds them")
        )
    return config


def _fitted(denoiser: Denoiser, config: UNetConfig) -> Denoiser:
    """The denoiser with another kind of layers for known frames, or without any. New inputs have weights of 0, so it
    draws the same as before. Layers of their own begin as the temporal layers."""
    other, before = Denoiser(config), denoiser.state_dict()
    state = other.state_dict()
    for name in state:
        theirs = before.get(name, before.get(name.replace("known.", "unet.", 1) if name.startswith("known.") else name))
        state[name] = state[name] if theirs is None else theirs
    other.load_state_dict(state)
    return other


def spatial_names(config: UNetConfig) -> list[str]:
    """Parameters of `Denoiser` that make the still-picture network: 2-D residual blocks, spatial transformers, down-
    and upsampling, the first and the last convolution, but not the embeddings of time, cues, prior and context
    (reference: the keys shared with Stable Diffusion 2.1, 682 of the released model's; spec section 8).
    """
    with torch.device("meta"):
        spatial = UNet(config, temporal=False)
    return [f"unet.{name}" for name, _ in spatial.named_parameters() if not name.startswith(_NOT_SPATIAL)]


class Objective(nn.Module):
    """The losses of a step in one forward pass, so that one backward pass (and one average over processes) suffices."""

    def __init__(self, networks: Trainable, gain_weight: float, recompute: bool = False) -> None:
        super().__init__()
        self.denoiser = networks.denoiser.train()
        self.denoiser.unet.recompute = recompute
        self.text = networks.text
        self.gain_weight = gain_weight
        self.train_text = any(p.requires_grad for p in networks.text.parameters())
        abar = torch.from_numpy(alphas_cumprod(networks.config.schedule))
        self.register_buffer("alpha", abar.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1.0 - abar).sqrt().float(), persistent=False)
        # In a tuple, so that torch does not register the same parameters twice.
        self._spatial = (networks.denoiser.spatial_unet(),)
        self._spatial[0].recompute = recompute
        self._known: tuple[UNet, ...] = () if self.denoiser.known is None else (self.denoiser.known_unet(),)
        for unet in self._known:
            unet.recompute = recompute

    alpha: Tensor
    sigma: Tensor

    @property
    def known_unet(self) -> UNet:
        """The network for clips with known frames, if they have layers of their own."""
        (unet,) = self._known
        return unet

    @property
    def unets(self) -> tuple[UNet, UNet]:
        """The network for clips, and the one for still pictures."""
        return self.denoiser.unet, *self._spatial

    def forward(
        self, images: Batch | None, videos: Batch | None, gains: GainBatch | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to minimise, the loss of pictures and the loss of clips: single numbers, means over the batch."""
        zero = self.alpha.new_zeros(())
        image = zero if images is None else self._image_loss(images)
        video, gain = (zero, zero) if videos is None else self._video_loss(videos)
        loss = image + video + self.gain_weight * gain
        if gains is not None:
            loss = loss + gain_loss(self.denoiser.unet, *self.conditions(gains), gains.square)
        return loss, image.detach(), video.detach()

    def _image_loss(self, batch: Batch) -> Tensor:
        context, embedding = self.conditions(batch)
        alpha, sigma = self.alpha[batch.t], self.sigma[batch.t]
        (unet,) = self._spatial
        return v_loss(unet, batch.x0, batch.noise, batch.t, alpha, sigma, context, embedding, None).mean()

    def _video_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        context, embedding = self.conditions(batch)
        alpha, sigma, unet = self.alpha[batch.t], self.sigma[batch.t], self.denoiser.unet
        known = None if batch.known is None or batch.mask is None else Known(batch.known, batch.mask)
        own = known is not None and bool(self._known)
        if own:
            (unet,) = self._known
        given = unet, batch.x0, batch.noise, batch.t, alpha, sigma, context, embedding
        if batch.prior is None or not unet.config.prior_preconditioning:
            loss = v_loss(*given, batch.prior, known).mean()
            return loss, loss.new_zeros(())
        loss = residual_v_loss(*given, batch.prior, known).mean()
        if own:  # they have no gain to train: their estimate is the difference from the blend
            return loss, loss.new_zeros(())
        return loss, gain_loss(unet, context, embedding, residual_square(batch.x0, batch.prior))

    def conditions(self, batch: Batch | GainBatch) -> tuple[Tensor, Tensor]:
        """The context tokens [B,K,Dc] and the embedding of the cues [B,F,E] of a batch."""
        with torch.set_grad_enabled(self.train_text):
            hidden = self.text(input_ids=batch.tokens).last_hidden_state
        context, embedding = self.denoiser.conditioner(hidden, batch.motion, batch.appearance)
        return context, embedding


def write_model(
    networks: Networks, trained: Mapping[str, Tensor], output: Path, dtype: str = "fp32", overwrite: bool = False
) -> Bundle:
    """Write a model directory. `trained`: weights of `Objective` by name (a run's averages). Other weights are copied.

    Raises ModelError if it cannot be written, or if a weight is not finite in `dtype`.
    """
    source = networks.companions
    with create_model(output, spec.manifest(networks.own or networks.config), overwrite) as folder:
        write_safetensors(folder / spec.UNET, below(trained, "denoiser."), dtype)
        text = below(trained, "text.")
        if text:
            write_safetensors(folder / spec.TEXT_ENCODER, text, dtype)
        else:
            shutil.copyfile(source.file(spec.TEXT_ENCODER, verify=False), folder / spec.TEXT_ENCODER)
        shutil.copyfile(source.file(spec.AUTOENCODER, verify=False), folder / spec.AUTOENCODER)
        write_tokenizer(networks.tokenizer.tokenizer, folder / spec.TOKENIZER)
    return Bundle.open(output)
