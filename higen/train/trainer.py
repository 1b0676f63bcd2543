"""The training loop (`higen train CONFIG.toml`): any size, one process or many, exact resume.

Step n draws random numbers of its own (seed, n) and its samples are a function of (seed, n) alone, so a run that was
killed goes on as if it had never stopped, and N processes see the batches that one would.

    torchrun --nproc-per-node 4 -m higen train CONFIG.toml
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from higen.bundle import Bundle
from higen.errors import ModelError, SettingsError, TrainingError
from higen.families.higen import spec
from higen.model_folder import check_free
from higen.staging import staging, whole_file
from higen.train.batches import Batch, Batches
from higen.train.checkpoints import Checkpoints
from higen.train.data import IMAGE, VIDEO, Listing, list_items, summary
from higen.train.latents import LatentCache, OpenClip, other_likeness, tower_sha256
from higen.train.media import READING
from higen.train.networks import Networks, Objective, build, spatial_names, write_model
from higen.train.notices import notices
from higen.train.optimise import Optimiser
from higen.train.processes import shares, start_processes, stop_signals
from higen.train.reader import Frame, Reader
from higen.train.record import Record, lock
from higen.train.settings import Settings, difference, flat
from higen.typed_json import to_json

__all__ = ["Trainer", "export", "scale_gradients", "train"]

Say = Callable[[str], None]
ARCHITECTURE = "model (architecture)"
TOWER = "cues.openclip (configuration and weights)"


def train(
    settings: Settings, *, resume: bool | None = None, say: Say = lambda _: None, progress: bool = False
) -> Bundle:
    """Train to the last step and write the model directory <output>/model with the averaged weights.

    resume    True: there must be a checkpoint; False: start anew; None: go on where there is one
    say       receives a line for each event worth one
    progress  show a bar on stderr

    Raises SettingsError (settings, data set, another configuration on resume), TrainingError (a file cannot be
    written, a loss that is not finite), ModelError (a model directory cannot be written), MissingExtra, what opening
    the model raises, and KeyboardInterrupt after Ctrl-C, when a checkpoint has been saved.
    """
    trainer = Trainer(settings, say)
    try:
        trainer.start(resume)
        trainer.run(progress)
        return trainer.finish()
    except OSError as error:  # logs, sheets and what else is written on the way
        raise TrainingError(f"{settings.run.output}: {error}") from error
    finally:
        trainer.close()


def export(settings: Settings, output: Path, overwrite: bool = False) -> Bundle:
    """Write the averaged weights of a run's newest checkpoint as a model directory.

    Raises TrainingError where there is no checkpoint, SettingsError where it is of another configuration, ModelError.
    """
    state = Checkpoints(Path(settings.run.output, "checkpoints"), settings.run.keep).load()
    if state is None:
        raise TrainingError(f"{settings.run.output}: no checkpoint to export")
    if os.path.lexists(output) and not overwrite:
        raise ModelError(f"{output}: exists already; --overwrite replaces a model directory")
    check_free(output, overwrite)
    listing = list_items(settings.data.path)
    networks = build(settings, (item.caption for item in listing.items))
    _check_same(state, settings, _identity(settings, networks, listing))
    return write_model(networks, state["average"], output, settings.run.weights, overwrite)


class Trainer:
    """Networks, their averages, optimiser and data of a run, on this process's device."""

    def __init__(self, settings: Settings, say: Say = lambda _: None) -> None:
        self.settings, self.say = settings, say
        self.listing = list_items(settings.data.path)
        self.networks = build(settings, (item.caption for item in self.listing.items))
        self.accelerator = start_processes(unused_parameters=settings.data.videos == 0)
        device: torch.device = self.accelerator.device
        self._share = shares(settings, self.accelerator.num_processes, self.accelerator.process_index)
        self.networks.encoder.to(device)
        self.objective = Objective(self.networks, settings.objective.gain_weight, settings.run.recompute).to(device)
        self.trained = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        self.spatial = [self.trained[f"denoiser.{name}"] for name in spatial_names(self.networks.config.unet)]
        self.optimiser = Optimiser(self.trained, settings.optimiser, settings.run.steps)
        self.parallel: nn.Module = self.accelerator.prepare(self.objective)
        self.identity = _identity(settings, self.networks, self.listing)
        self.reader = _reader(settings, self.networks, self.listing, self.identity, device)
        self.batches = Batches(
            self.networks.config, self.networks.tokenizer, settings.cues, settings.objective, settings.run.seed
        )
        self.checkpoints = Checkpoints(Path(settings.run.output, "checkpoints"), settings.run.keep)
        self._saved: int | None = None
        self._record: Record | None = None
        self._lock: int | None = None

    @property
    def step(self) -> int:
        """Steps made."""
        return self.optimiser.step

    def start(self, resume: bool | None = None) -> None:
        """Load the newest checkpoint, unless told otherwise, and open the logs."""
        if self.accelerator.is_main_process:
            self._lock = lock(Path(self.settings.run.output))
            check_free(Path(self.settings.run.output, "model"), overwrite=True)  # `finish` writes it
            if resume is False:
                self.checkpoints.clear()
        self.accelerator.wait_for_everyone()
        state = self.checkpoints.load()
        if state is not None:
            _check_same(state, self.settings, self.identity)
            self._load(state)
            self._tell(f"going on after step {self.step} of {self.settings.run.steps}")
        elif resume:
            raise TrainingError(f"{self.checkpoints.folder}: no checkpoint to go on from")
        elif self.settings.model.init and (line := other_likeness(self.networks.config, self.settings.cues.openclip)):
            self._tell(line)
        if self.accelerator.is_main_process:
            if state is None:
                self._warn()
            self._record = Record(Path(self.settings.run.output), self.step, self.settings.run.tensorboard)

    def _warn(self) -> None:
        """Say what is to be known of the run before its first step."""
        bfloat16 = self.settings.run.precision == "bf16"
        for line in notices(self.listing, self.reader.frame, self.networks.encoder, self.networks.tokenizer, bfloat16):
            self.say(line)

    def run(self, progress: bool = False) -> None:
        """Make the steps that are left. Ctrl-C or SIGTERM saves after the present step and raises KeyboardInterrupt."""
        from tqdm import tqdm

        run = self.settings.run
        shown = progress and self.accelerator.is_main_process
        with stop_signals() as stopped, tqdm(total=run.steps, initial=self.step, disable=not shown) as bar:
            while self.step < run.steps:
                values = self.advance()
                bar.update()
                if self.step % run.log_every == 0 or self.step == run.steps:
                    self._log(values, bar)
                if self._agreed(stopped):
                    self.save()
                    raise KeyboardInterrupt
                if self.step % run.save_every == 0:
                    self.save()
                if run.sample_every and self.step % run.sample_every == 0:
                    self._sample()

    def advance(self) -> dict[str, Tensor]:
        """Make one step; returns its numbers, this process's share of them."""
        run, step, rate = self.settings.run, self.step, self.optimiser.rate
        images, videos = (self._batch(kind, step) for kind in (IMAGE, VIDEO))
        # Dropout layers are the only ones left that draw from the global generator.
        torch.manual_seed((run.seed * 1_000_003 + step) * 1_009 + self.accelerator.process_index)
        self.optimiser.clear()
        image, video = self._gradients(images, videos)
        if (factor := self.settings.optimiser.spatial_gradient) != 1:
            scale_gradients(self.spatial, factor)
        norm = self.optimiser.advance()
        found = {"image": image} if images is not None else {}
        found |= {"video": video} if videos is not None else {}
        return {**found, "gradient": norm, "rate": torch.tensor(rate, dtype=torch.float64)}

    def _gradients(self, images: Batch | None, videos: Batch | None) -> tuple[Tensor, Tensor]:
        """Add up the gradients of a step's micro-batches; returns the mean losses of pictures and clips."""
        run, image, video = self.settings.run, torch.zeros(()), torch.zeros(())
        n = run.micro_batches
        parts = zip(*(([None] * n if batch is None else batch.split(n)) for batch in (images, videos)), strict=True)
        for i, (some_images, some_videos) in enumerate(parts):
            # Processes exchange gradients once a step, with the last part.
            waiting = contextlib.nullcontext() if i == n - 1 else self.accelerator.no_sync(self.parallel)
            with waiting:
                with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                    loss, of_images, of_videos = self.parallel(some_images, some_videos)
                self.accelerator.backward(loss / n)
            image, video = image.to(of_images) + of_images / n, video.to(of_videos) + of_videos / n
        return image, video

    def save(self) -> None:
        """Write a checkpoint, once per step; every process calls it."""
        if self._saved == self.step:
            return
        skipped = self._all_skipped()
        if self.accelerator.is_main_process:
            self.checkpoints.save(
                self.step,
                {
                    **self.optimiser.state(),
                    "settings": flat(self.settings),
                    "identity": self.identity,
                },
            )
            if self._record is not None:
                self._record.skipped(skipped)
        self.accelerator.wait_for_everyone()
        self._saved = self.step

    def finish(self) -> Bundle:
        """Save, write <output>/model, and report the files that were left out."""
        self.save()
        output = Path(self.settings.run.output, "model")
        skipped = self._all_skipped()
        if self._record is not None:
            skipped = self._record.skipped(skipped)
        if self.accelerator.is_main_process:
            write_model(self.networks, self.optimiser.average, output, self.settings.run.weights, overwrite=True)
            if skipped:
                self._tell(f"{summary(skipped)}; see {Path(self.settings.run.output, 'skipped.jsonl')}")
            if self.listing.notes:
                self._tell(summary(self.listing.notes, "read otherwise than asked"))
        self.accelerator.wait_for_everyone()
        return Bundle.open(output)

    def close(self) -> None:
        """Stop reading ahead and close the logs."""
        self.reader.close()
        if self._record is not None:
            self._record.close()
        if self._lock is not None:
            os.close(self._lock)
        if self.accelerator.num_processes > 1:
            self.accelerator.end_training()

    def _batch(self, kind: int, step: int) -> Batch | None:
        indices = self._share[kind]
        if not indices:
            return None
        samples = self.reader.samples(kind, step, indices)
        return self.batches.batch(samples, kind, step, indices).to(self.accelerator.device)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.optimiser.load(state)
        self._saved = self.step

    def _log(self, values: Mapping[str, Tensor], bar: Any) -> None:
        numbers = {}
        for name, value in values.items():
            whole = self.accelerator.reduce(value, "mean") if name in ("image", "video") else value
            numbers[name] = float(whole)
        if self._record is not None:
            self._record.log(self.step, numbers)
        bar.set_postfix({name: f"{numbers[name]:.4f}" for name in ("image", "video") if name in numbers})
        if bar.disable:
            listed = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self._tell(f"step {self.step} of {self.settings.run.steps}: {listed}")

    def _tell(self, line: str) -> None:
        """Say a line, once for all processes."""
        if self.accelerator.is_main_process:
            self.say(line)

    def _sample(self) -> None:
        """A contact sheet of the prompts, made by the pipeline a user has, from a model directory just written."""
        if self.accelerator.is_main_process:
            from higen.api import load
            from higen.video import contact_sheet

            output = Path(self.settings.run.output)
            with staging(output) as scratch:
                made = scratch.folder / "model"
                write_model(self.networks, self.optimiser.average, made, self.settings.run.weights)
                with load(made, "torch", device=str(self.accelerator.device), verify=False) as pipe:
                    options = {**vars(self.reader.frame), "seed": self.settings.run.seed}
                    videos = pipe(list(self.settings.run.sample_prompts), progress=False, **options)
            folder = output / "samples"
            folder.mkdir(exist_ok=True)
            with whole_file(folder / f"step-{self.step:08d}.png") as temporary:
                contact_sheet(videos).save(temporary)
        self.accelerator.wait_for_everyone()

    def _agreed(self, stopped: threading.Event) -> bool:
        """Whether any process was told to stop."""
        if self.accelerator.num_processes == 1:
            return stopped.is_set()
        flag = torch.tensor(float(stopped.is_set()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _all_skipped(self) -> dict[str, str]:
        """The files left out since the start of these processes, by any of them."""
        from accelerate.utils import gather_object

        own = dict(self.listing.skipped)
        if self.accelerator.num_processes == 1:
            return own
        return dict(gather_object(list(own.items())))


def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    """Multiply the gradients that are there."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def _reader(
    settings: Settings, networks: Networks, listing: Listing, identity: Mapping[str, Any], device: torch.device
) -> Reader:
    data, model, cues = settings.data, networks.config, settings.cues
    defaults, multiple = model.defaults, model.autoencoder.factor * model.unet.size_multiple
    frame = Frame(*(getattr(data, name) or getattr(defaults, name) for name in ("frames", "width", "height", "fps")))
    for name in ("width", "height"):
        if getattr(frame, name) % multiple:
            raise SettingsError(f"data.{name}={getattr(frame, name)}: a multiple of {multiple} for this model")
    if not 2 <= frame.frames <= model.max_frames:
        raise SettingsError(f"data.frames={frame.frames}: from 2 to {model.max_frames} for this model")
    features = OpenClip(cues.openclip, device) if cues.openclip is not None else None
    recipe = {
        "reading": READING,
        "frame": [frame.frames, frame.width, frame.height, frame.fps],
        "autoencoder": networks.companions.files[spec.AUTOENCODER].sha256,
        "scale": to_json(model.autoencoder),
        "openclip": identity[TOWER],
    }
    return Reader(
        listing,
        frame,
        networks.encoder,
        features,
        seed=settings.run.seed,
        per_step={IMAGE: data.images, VIDEO: data.videos},
        key_frames=data.key_frames,
        random_crop=data.crop == "random",
        random_start=data.start == "random",
        cache=LatentCache(data.cache, recipe) if data.cache is not None else None,
        workers=data.workers,
    )


def _identity(settings: Settings, networks: Networks, listing: Listing) -> dict[str, Any]:
    """What lies at the paths of the settings, by content."""
    records = networks.companions.files
    return {
        "data.path (names and captions)": listing.fingerprint(),
        ARCHITECTURE: _unnamed(spec.write_config(networks.config)),
        "model (autoencoder)": records[spec.AUTOENCODER].sha256,
        "model (text encoder)": records[spec.TEXT_ENCODER].sha256,
        "model (tokenizer)": records[spec.TOKENIZER].sha256,
        TOWER: None if settings.cues.openclip is None else tower_sha256(settings.cues.openclip),
    }


def _unnamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only says whose model it is, which may change when a run goes on."""
    return {key: value for key, value in config.items() if key not in ("name", "licence", "prompts")}


def _check_same(state: Mapping[str, Any], settings: Settings, identity: Mapping[str, Any]) -> None:
    """Raise SettingsError naming the first key in which a checkpoint is of another configuration."""
    found = difference(state["settings"], settings)
    for name, value in identity.items():
        # A checkpoint of an earlier version does not know all of them, and kept the names with the architecture.
        before = state["identity"].get(name, value)
        if name == ARCHITECTURE:
            before = _unnamed(before)
        if found is None and before != value:
            found = f"{name} is not what it was"
    if found is not None:
        raise SettingsError(
            f"{settings.run.output} holds a run of another configuration: {found}; "
            "put it back, choose another run.output, or start anew with --fresh"
        )
