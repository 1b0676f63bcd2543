"""Makes a model directory from the recipe's training results: half-precision weights, tokenizer, manifest.

python -m higen.train.emoji.assemble --state FOLDER --output DIR
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from higen import bundle
from higen.errors import TrainingError
from higen.families.higen import spec
from higen.families.higen.spec import AutoencoderConfig, ModelConfig, UNetConfig
from higen.models.nestings import below
from higen.tokenizer import build_word_tokenizer
from higen.train.checkpoints import Checkpoints
from higen.train.emoji.configuration import WORDS, architecture
from higen.train.emoji.decoder import RESULT as DECODER
from higen.train.emoji.subjects import BACKGROUNDS, SPEEDS, SUBJECTS, caption

__all__ = ["assemble"]


def model_config(autoencoder: AutoencoderConfig) -> ModelConfig:
    """The default model's configuration, for any weights."""
    normal = SPEEDS[1]
    prompts = (caption(subject, BACKGROUNDS[3 * i % len(BACKGROUNDS)], normal) for i, subject in enumerate(SUBJECTS))
    return replace(architecture(), autoencoder=autoencoder, prompts=tuple(prompts))


def assemble(
    state: Path, output: Path, overwrite: bool = False, trained: Path | None = None, unet: UNetConfig | None = None
) -> bundle.Bundle:
    """Write the model directory `output` from the codec in `state` and the averaged weights of the newest checkpoint.
    If there is a decoder that was trained on drawn latents, it replaces the codec's.

    `unet` and `trained`: configuration of a denoiser other than the recipe's, and the folder in which it was trained.
    Raises TrainingError if there is no checkpoint.
    """
    made = Checkpoints((trained or state) / "checkpoints", keep=2).load()
    if made is None:
        raise TrainingError(f"{trained or state}: no checkpoint; train the denoiser first")
    average = made["average"]
    statistics = load_file(state / "latents.safetensors")
    autoencoder = AutoencoderConfig(
        kind="AutoencoderDC",
        arguments=json.loads((state / "autoencoder.json").read_text(encoding="utf-8")),
        factor=16,
        shift=tuple(statistics["mean"].tolist()),
        scale=tuple((1 / statistics["std"]).tolist()),
    )
    config = model_config(autoencoder)
    config = config if unet is None else replace(config, unet=unet)
    with bundle.create_model(output, spec.manifest(config), overwrite) as folder:
        save_file(half_precision(average, "denoiser."), folder / spec.UNET)
        save_file(half_precision(average, "text."), folder / spec.TEXT_ENCODER)
        save_file(half_precision(_codec(state), ""), folder / spec.AUTOENCODER)
        build_word_tokenizer(WORDS).save(str(folder / spec.TOKENIZER))
    return bundle.Bundle.open(output)


def _codec(state: Path) -> dict[str, Tensor]:
    weights, decoder = load_file(state / "autoencoder.safetensors"), state / DECODER
    return weights | ({f"decoder.{name}": t for name, t in load_file(decoder).items()} if decoder.exists() else {})


def half_precision(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with this prefix, by the rest of their names. Floating-point tensors become float16."""
    chosen = below(tensors, prefix)
    return {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in chosen.items()}


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Make the default model's directory.")
    parser.add_argument("--state", type=Path, required=True, help="folder with the trained weights")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    assemble(arguments.state, arguments.output, arguments.overwrite)


if __name__ == "__main__":
    main()
