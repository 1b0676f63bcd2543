"""Makes tests/reference, the part of the reference that is small enough to commit.

    python tests/make_reference_subset.py ../shared/reference

The weights of both models are not stored, because the recipe makes them again bit for bit (this is checked here).
`higen parity tests/reference` runs the result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from higen.parity.fixtures import recipe_salt, recipe_tensor

REFERENCE = Path(__file__).parent / "reference"
TARGET = REFERENCE / "fixtures"
LIMIT = 3_500_000
"""Largest size of the whole folder in bytes."""

KEPT = {
    "forward": [
        "p1/spatial_b1_8x12_t981",  # with every block
        "p1/spatial_b2_12x8_t",
        "p1/spatial_b1_8x8_arbcond",
        "p1/temporal_f2_b2_4x4",
        "p1/temporal_f8_motion_len_f",
        "p2/spatial_b1_16x24_t981",
        "p2/temporal_f4_b1_16x8_t501",
    ],
    "sample": ["p1/ddim10_b2_f4_8x4_g9"],
    "train": ["p1/train_f32_b2", "p1/train_f1_b2"],
}
DROPPED_UNITS = ("p1/output_blocks.0.0@", "p1/output_blocks.3.0@")
"""Two large residual blocks of the decoder; output_blocks.4.0 and 5.0 are kept."""


def companions(source: Path) -> None:
    """Write the text encoder and the tokenizer; the autoencoder's weights are too large."""
    target = REFERENCE / "companions"
    target.mkdir(parents=True, exist_ok=True)
    record = json.loads((source / "companions.json").read_text())
    (target / "companions.json").write_text(json.dumps({k: record[k] for k in ("text", "tokenizer")}) + "\n")
    stored = load_file(source / "companions.safetensors")
    save_file({k: v for k, v in stored.items() if k.startswith("text")}, target / "companions.safetensors")


def fixtures(source: Path) -> None:
    """Write the small models' cases."""
    record = json.loads((source / "fixtures.json").read_text())
    for kind, names in KEPT.items():
        record[kind] = {name: record[kind][name] for name in names}
    record["units"] = {name: case for name, case in record["units"].items() if not name.startswith(DROPPED_UNITS)}

    TARGET.mkdir(parents=True, exist_ok=True)
    for name, model in record["models"].items():
        if model["stored"]:
            check_recipe(source / f"{name}.weights.safetensors", recipe_salt(model["weight_recipe"], name))
            model["stored"] = False
        for kind in (*KEPT, "units"):
            cases = {case.partition("/")[2] for case in record[kind] if case.startswith(f"{name}/")}
            if cases:
                stored = load_file(source / f"{name}.{kind}.safetensors")
                kept = {key: value for key, value in stored.items() if key.partition("/")[0] in cases}
                save_file(kept, TARGET / f"{name}.{kind}.safetensors")
    save_file(load_file(source / "misc.safetensors"), TARGET / "misc.safetensors")
    (TARGET / "fixtures.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    size = sum(path.stat().st_size for path in TARGET.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{TARGET} has {size} bytes: at most {LIMIT}")
    print(f"{TARGET}: {size} bytes")


def check_recipe(path: Path, salt: int) -> None:
    """Raise an error if the recipe does not give the stored weights bit for bit, because they would be lost."""
    for key, tensor in load_file(path).items():
        if not torch.equal(recipe_tensor(key, tensor.shape, salt), tensor):
            raise SystemExit(f"{path}: {key} is not what the recipe with salt {salt} gives")


if __name__ == "__main__":
    fixtures(Path(sys.argv[1]) / "fixtures")
    companions(Path(sys.argv[1]) / "companions")
