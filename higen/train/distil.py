"""Distillation: a student learns to draw in a few plain steps what its teacher draws in more steps, with guidance.

For a sample's text, cues, prior and noise, the teacher draws its result. The student runs its own few rows from the
same noise. In every row, its estimate of the clean latents is compared with the teacher's result: the regression of the
end point of Luhman and Luhman (2021), for each of a few rows. The rows begin at states that the student made itself, so
it learns to correct its own errors. No gradient passes from a row to the row before.

Both run the modules of the stages (`SolverStep`), so a trained student draws as it does in the pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from higen.errors import RequestError, SettingsError
from higen.families.higen import spec
from higen.families.higen.network import VelocityPredictor
from higen.families.higen.spec import ModelConfig
from higen.families.higen.unet import Denoiser
from higen.models.solver_step import SolverStep
from higen.sampler import COEFFICIENTS
from higen.schedule import SolverTable, solver_table
from higen.stages import Stage
from higen.train.batches import Batch, GainBatch
from higen.train.networks import Objective, Trainable
from higen.train.settings import DistilSettings

__all__ = ["Distillation", "Sampling", "distilled", "samplings"]


@dataclass(frozen=True)
class Sampling:
    """How one loop is drawn: the stage of its steps, their table, and the guidance of each."""

    stage: Stage
    table: SolverTable
    guidance: float = 1.0


def distilled(config: ModelConfig, distil: DistilSettings) -> ModelConfig:
    """The configuration of the distilled model. Its distilled loops have few steps by default, and only plain ones. It
    has no presets, because they were made for the loops before.

    The student's solver is always DPM++2M, because DDIM's few steps do not begin at the noise. Raises SettingsError if
    this would change key frames that are to be drawn as before.
    """
    defaults, name = config.defaults, spec.DPM.name
    if not distil.steps[0] and defaults.solver != name:
        raise SettingsError(
            f"distil.steps={list(distil.steps)}: few steps need the solver {name!r}, but {config.name} draws its key "
            f"frames with {defaults.solver!r}; distil both loops"
        )
    kept = zip(distil.steps, defaults.steps, defaults.guidance, config.guided, strict=True)
    (n, g, both), (m, h, also) = ((n, 1.0, False) if n else (own, scale, has) for n, own, scale, has in kept)
    defaults = replace(defaults, steps=(n, m), guidance=(g, h), solver=name, presets=())
    return replace(config, defaults=defaults, guided=(both, also))


def samplings(config: ModelConfig, distil: DistilSettings) -> list[tuple[Sampling, Sampling] | None]:
    """How the student and the teacher draw in the spatial and the temporal loop; None: the loop is not distilled.

    `config`: that of the teacher. Raises SettingsError for steps that the schedule does not allow, a teacher with fewer
    steps than the student, and guidance for a teacher without guided steps.
    """
    found: list[tuple[Sampling, Sampling] | None] = []
    teachers, students = spec.manifest(config), spec.manifest(distilled(config, distil))
    for i, (loop, own) in enumerate(zip(teachers.loops, students.loops, strict=True)):
        if not distil.steps[i]:
            found.append(None)
            continue
        steps = distil.teacher_steps[i] if distil.teacher_steps else config.defaults.steps[i]
        guidance = distil.teacher_guidance[i] if distil.teacher_guidance else config.defaults.guidance[i]
        if steps < distil.steps[i]:
            raise SettingsError(
                f"distil.steps={list(distil.steps)}: the teacher has only {steps} steps in the loop {loop.name}; "
                "fewer steps, or more in distil.teacher_steps"
            )
        if loop.guided is None and guidance != 1:
            raise SettingsError(
                f"distil.teacher_guidance={list(distil.teacher_guidance)}: the loop {loop.name} of {config.name} has "
                "no guidance; 1 is allowed"
            )
        names = (own.plain or "", (loop.plain if guidance == 1 else loop.guided) or "")
        try:
            student = solver_table(own.schedule, own.prediction, own.solvers[0], distil.steps[i])
            teacher = solver_table(loop.schedule, loop.prediction, loop.solvers[0], steps)
        except RequestError as error:
            raise SettingsError(f"distil: the loop {loop.name}: {error}") from error
        found.append(
            (Sampling(students.stage(names[0]), student), Sampling(teachers.stage(names[1]), teacher, guidance))
        )
    return found


class Distillation(Objective):
    """The losses of a step of distillation, in place of those of v-prediction. It keeps a copy of the whole denoiser as
    the teacher.
    """

    def __init__(self, networks: Trainable, distil: DistilSettings, empty: Tensor, recompute: bool = False) -> None:
        """`empty`: tokens int64 [1,L] of the empty prompt. Raises SettingsError, as `samplings` does.

        Make it before adapters are put into the networks: the teacher has none.
        """
        super().__init__(networks, gain_weight=0.0, recompute=recompute)
        self.samplings, self.target = samplings(networks.config, distil), distil.target
        self.teacher = copy.deepcopy(networks.denoiser).eval().requires_grad_(False)
        # In a tuple, so that torch does not register the same parameters again.
        self._teachers = (self.teacher.spatial_unet(), self.teacher.unet)
        self.register_buffer("empty", empty, persistent=False)

    empty: Tensor

    def forward(
        self, images: Batch | None, videos: Batch | None, gains: GainBatch | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss to minimise, the loss of pictures and the loss of clips: mean squared errors of the student's
        estimates of the clean latents, over all its rows."""
        image, video = (
            self.alpha.new_zeros(()) if batch is None else self._loss(batch, loop)
            for loop, batch in enumerate((images, videos))
        )
        return image + video, image.detach(), video.detach()

    @torch.no_grad()
    def drawn(self, batch: Batch, loop: int, teacher: bool = False) -> Tensor:
        """What the student or the teacher draws for a batch, from its noise: clean latents [B,C,F,H,W].

        loop  0: pictures, 1: clips
        """
        *_, last = self._estimates(batch, loop, teacher)
        return last

    def _loss(self, batch: Batch, loop: int) -> Tensor:
        wanted = batch.x0 if self.target == "clip" else self.drawn(batch, loop, teacher=True)
        rows = [(estimate - wanted).pow(2).mean() for estimate in self._estimates(batch, loop, teacher=False)]
        return torch.stack(rows).mean()

    def _estimates(self, batch: Batch, loop: int, teacher: bool) -> Iterator[Tensor]:
        """The estimate of the clean latents in each row, with a gradient that ends at the row's own state."""
        pair = self.samplings[loop]
        assert pair is not None, "a batch of a loop that is not distilled"
        sampling = pair[1 if teacher else 0]
        unet = self._teachers[loop] if teacher else self.unets[1 - loop]
        denoiser = self.teacher if teacher else self.denoiser
        step = SolverStep(sampling.stage, VelocityPredictor(unet))
        given = self._given(denoiser, batch, sampling)
        x, previous = sampling.table.initial * batch.noise, torch.zeros_like(batch.noise)
        for i in range(len(sampling.table)):
            row = {name: x.new_full(x.shape[:1], float(getattr(sampling.table, name)[i])) for name in COEFFICIENTS}
            state = {"latents": x, "previous": previous, **row, **given}
            after, estimate = step(*(state[name] for name in step.inputs))
            x, previous = after.detach(), estimate.detach()
            yield estimate

    def _given(self, denoiser: Denoiser, batch: Batch, sampling: Sampling) -> Mapping[str, Tensor]:
        """The inputs of a step that are the same in every row."""
        rows, frames = batch.noise.shape[0], batch.noise.shape[2]
        context, embedding = self._told(denoiser, batch.tokens, batch)
        given = {
            "context": context,
            "frame_embedding": embedding,
            "guidance": context.new_full((rows, frames), sampling.guidance, dtype=torch.float32),
            # No frame is known.
            "known": torch.zeros_like(batch.noise),
            "known_mask": batch.noise.new_zeros((rows, frames)),
        }
        if batch.prior is not None:
            given["prior"] = batch.prior
        if sampling.stage.guided:
            given["empty_context"] = self._told(denoiser, self.empty.expand(rows, -1), batch)[0]
        return given

    def _told(self, denoiser: Denoiser, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hidden = self.text(input_ids=tokens).last_hidden_state
        context, embedding = denoiser.conditioner(hidden, batch.motion, batch.appearance)
        return context, embedding
