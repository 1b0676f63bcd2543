"""Writes manifests that tests have edited, with a correct seal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higen.bundle import MANIFEST

__all__ = ["edit", "write"]


def write(model: Path, document: object) -> None:
    """Write higen.json. A seal that is a string is replaced by the correct one (docs/manifest.md, "The seal")."""
    if isinstance(document, dict) and isinstance(document.get("seal"), str):
        document = {**document, "seal": "0" * 64}
        text = json.dumps(document)
        digest = hashlib.sha256(text.encode()).hexdigest()
        (model / MANIFEST).write_text(text.replace(f'"seal": "{"0" * 64}"', f'"seal": "{digest}"', 1))
    else:
        (model / MANIFEST).write_text(json.dumps(document))


def edit(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a model directory."""
    document = json.loads((model / MANIFEST).read_text())
    change(document)
    write(model, document)
