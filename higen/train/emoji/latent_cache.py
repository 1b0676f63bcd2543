"""Encodes every picture of the default model's data once, so that its U-Net trains on latents from memory.

    python -m higen.train.emoji.latent_cache --data FOLDER --state FOLDER

`FOLDER/latents.safetensors` contains `latents/<name>` for each subject: float16 [backgrounds, loop frames, 32, 8, 8],
normalised as (z - mean) / std. It also contains `mean` and `std`: float32 [32], per channel over the whole data set.
Backgrounds are in the order of `subjects.BACKGROUNDS`. Held-out combinations are included; the trainer leaves them out.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch import Tensor

from higen.errors import TrainingError
from higen.families.higen.spec import AutoencoderConfig
from higen.locks import claimed
from higen.train.emoji.autoencoder import Pictures, load
from higen.train.emoji.subjects import BACKGROUNDS, SUBJECTS
from higen.train.emoji.tensor_files import aside

CHUNK = 36


@torch.inference_mode()
def encode_subject(model: AutoencoderDC, pictures: Pictures, subject: int) -> Tensor:
    """Unnormalised latents of a loop over every background: float32 [backgrounds, loop frames, 32, 8, 8]."""
    chunks = torch.split(torch.arange(len(pictures.loops[subject])), CHUNK)
    rows = [
        torch.cat([model.encoder(pictures.compose(subject, picture, chunk)[0]) for chunk in chunks])
        for picture in range(len(BACKGROUNDS))
    ]
    return torch.stack(rows)


def channel_statistics(latents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 [32] each, of the channels (third dimension from the end) of `latents`."""
    columns = torch.cat([z.transpose(-3, 0).flatten(1) for z in latents], dim=1).double()
    return columns.mean(dim=1).float(), columns.std(dim=1).float()


def normalise(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(z - mean) / std per channel of [..., 32, 8, 8]; `denormalise` undoes it."""
    return (latents - mean[:, None, None]) / std[:, None, None]


def denormalise(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """z * std + mean per channel of [..., 32, 8, 8], as input for the decoder."""
    return latents * std[:, None, None] + mean[:, None, None]


def load_latents(path: Path) -> dict[str, Tensor]:
    """The cache's tensors by name, as the module's docstring lists them. Raises TrainingError if it is missing."""
    check_made(path)
    return load_file(path)


def check_made(path: Path) -> None:
    """Raise TrainingError if the cache is missing."""
    if not path.is_file():
        command = "python -m higen.train.emoji.latent_cache --data FOLDER"
        raise TrainingError(f"{path}: missing (make it: {command} --state {path.parent})")


def write(data: Path, state: Path, scaled_as: AutoencoderConfig | None = None) -> None:
    """Encode the loops in `data` with the codec in `state`, and write the cache to `state`.

    The scale is measured. With `scaled_as` it is that of an existing model, because its denoiser, which is trained
    further, knows only that scale. Raises TrainingError if the cache cannot be written; an earlier cache stays.
    """
    model, pictures = load(state), Pictures(data)
    raw = [encode_subject(model, pictures, index) for index in range(len(SUBJECTS))]
    if scaled_as is None:
        mean, std = channel_statistics(raw)
    else:
        mean, std = torch.tensor(scaled_as.shift), 1 / torch.tensor(scaled_as.scale)
    tensors = {
        f"latents/{subject.name}": normalise(z, mean, std).half().contiguous()
        for subject, z in zip(SUBJECTS, raw, strict=True)
    }
    with aside(state / "latents.safetensors") as temporary:
        save_file(tensors | {"mean": mean, "std": std}, temporary)
    for name, z in tensors.items():
        print(f"{name} {list(z.shape)} largest {float(z.abs().max()):.1f}")
    print(f"std of the channels {float(std.min()):.3f} to {float(std.max()):.3f}")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Cache the default model's latents.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the WebP loops")
    parser.add_argument("--state", type=Path, required=True, help="folder of the trained codec, and of the cache")
    arguments = parser.parse_args()
    with claimed(arguments.state):
        write(arguments.data, arguments.state)


if __name__ == "__main__":
    main()
