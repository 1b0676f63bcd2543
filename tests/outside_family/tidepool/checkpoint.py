"""Tidepool's checkpoints: one safetensors file with tensors called `tide.NETWORK...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from higen.errors import CheckpointError
from higen.families import Converted
from higen.models.checkpoint_files import naming, read_names, read_state
from higen.tokenizer import build_word_tokenizer
from tidepool.spec import FILES, WORDS, Widths, manifest

__all__ = ["PREFIX", "convert", "recognise"]

PREFIX = "tide."


def recognise(path: Path) -> bool:
    """Whether a file is a Tidepool checkpoint."""
    return path.is_file() and f"{PREFIX}surge.along.weight" in read_names(path)


def convert(sources: Sequence[Path], **options: Any) -> Converted:
    """Tables and weights from a checkpoint's single file. Raises CheckpointError."""
    if options or len(sources) != 1:
        raise CheckpointError(f"{', '.join(map(str, sources)) or 'nothing'}: one file is wanted, and no options")
    (source,) = sources
    with naming(source):
        state = {name.removeprefix(PREFIX): tensor for name, tensor in read_state(source).items()}
        try:
            sizes = Widths(
                channels=state["surge.leave.weight"].shape[0],
                words=state["scribe.weight"].shape[1],
                curve=state["chart.current.weight"].shape[1],
                bearing=state["chart.text.weight"].shape[0],
                hidden=state["surge.row.weight"].shape[0],
            )
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"not a Tidepool checkpoint: {error}") from error
    weights = {
        file: {name: tensor for name, tensor in state.items() if name.partition(".")[0] in networks}
        for file, networks in FILES.items()
    }
    return Converted(
        manifest=manifest(sizes),
        weights=weights,
        texts={"tokenizer.json": build_word_tokenizer(WORDS).to_str(pretty=True)},
        notes=("The weights are random: the videos show nothing.",),
    )
