"""The whole recipe, from the npm packages to a model directory (`higen train default`). Every part resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from higen.bundle import Bundle
from higen.errors import SettingsError, TrainingError, quoted
from higen.families.higen import spec
from higen.locks import claimed
from higen.model_folder import check_free
from higen.train.emoji import autoencoder, decoder, few_steps, known_frames, latent_cache
from higen.train.emoji.assemble import assemble
from higen.train.emoji.configuration import DECODER
from higen.train.emoji.denoiser import all_clips, train
from higen.train.emoji.packs import DOWNLOAD, fetch, to_fetch
from higen.train.emoji.subjects import subjects_named
from higen.train.notices import slow_bfloat16

__all__ = ["run"]


def run(
    work: Path,
    output: Path,
    steps: int | None = None,
    codec_minutes: float = 45.0,
    start: Path | None = None,
    bf16: bool = False,
    few: Path | None = None,
) -> Bundle:
    """Fetch the emoji into `work`, train codec and denoiser there, then the decoder on what the denoiser draws, then
    the layers for known frames, and write the model directory `output`.

    Results that `work` already contains are not made again. `start`: a model of this recipe; new networks start from
    its weights as far as they fit, so that additional subjects need less training. `bf16`: mixed precision.
    `codec_minutes` is the codec's total training time, over all restarts. `few`: another model directory to write, with
    a model that is distilled from `output`, draws in few steps, and has no layers for known frames.
    Raises ManifestError if `start` has no model, SettingsError for a model of another recipe, and TrainingError if a
    part cannot start or another process works in `work`.
    """
    if few is not None:
        if few.resolve() == output.resolve():
            raise SettingsError(f"--few-steps={quoted(str(few))}: another directory than --output")
        check_free(few, overwrite=True)
    trained = None if start is None else Bundle.open(start)
    if trained is not None:
        subjects_named(trained.manifest.prompts)  # refuses the model before the codec is trained
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(str(error)) from error
    with claimed(work):
        if bf16 and (line := slow_bfloat16("leave --bf16 out")):
            print(line, flush=True)
        if packages := to_fetch(work / "data"):
            print(f"{len(packages)} npm packages are fetched into {work / 'data'}, {DOWNLOAD}", flush=True)
        try:
            fetch(work / "data")
        except (OSError, RuntimeError) as error:
            raise TrainingError(str(error)) from error
        if not (work / "autoencoder.safetensors").exists():
            autoencoder.train(work / "data", work, 60 * codec_minutes, trained)
        if not (work / "latents.safetensors").exists():
            codec = None if trained is None else spec.autoencoder_config(trained.manifest)
            latent_cache.write(work / "data", work, codec)
        train(work, all_clips(work, steps, bf16, trained), trained)
        if not (work / decoder.RESULT).exists():
            decoder.draw(assemble(work, work / "model", overwrite=True), work / "drawn")
            decoder.train(work / "data", work, replace(DECODER, precision="bf16" if bf16 else "fp32"))
        plain = assemble(work, work / "model", overwrite=True)
        made = known_frames.train(plain, work, output)
        if few is not None:
            # Its layers change, so those for known frames would not fit them.
            few_steps.train(plain, work, few)
        return made
