"""Recognises files that are not a complete checkpoint, such as a web page, a Git LFS pointer or half a download."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from higen.errors import quoted

__all__ = ["SAFETENSORS", "ZIP", "format_of", "not_a_checkpoint"]

SAFETENSORS, ZIP, PICKLE = "safetensors", "zip", "pickle"
"""Formats of checkpoints: safetensors, PyTorch's zip archive, and the pickle of older PyTorch versions."""

_HEADER = 100 * 2**20
"""Largest size in bytes of a safetensors file's header."""

_TEXT_PICKLE = re.compile(rb"\(?(?:[cl]?[a-zA-Z_][\w.]*\n[a-zA-Z_]\w*\n[(p]|d[pl]0\n|lp0\n)")
"""The start of a protocol 0 pickle that names a function, or holds a dictionary or a list."""

_OTHERS = {
    b"\x1f\x8b": "gzip data: unpack it",
    b"BZh": "bzip2 data: unpack it",
    b"\xfd7zXZ\0": "xz data: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd data: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"GGUF": "a GGUF file: the .safetensors or .pth version is wanted",
    b"\x89HDF": "an HDF5 file: the .safetensors or .pth version is wanted",
    b"\x93NUMPY": "a NumPy array: a file with tensors by name is wanted",
}


def format_of(path: Path) -> str | None:
    """The format of a checkpoint according to its first bytes, not its suffix; None if unknown. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        return ZIP
    # Tested before the pickle's two first bytes, because a header's length may begin with the same bytes.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _HEADER:
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    return None


def not_a_checkpoint(path: Path) -> str | None:
    """What the file is and what to do, if it is not a complete checkpoint; None if it may be one. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(512)
    size, kind = path.stat().st_size, format_of(path)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not size:
        return "an empty file: fetch it again"
    if kind == SAFETENSORS:  # first, because its leading length may look like another format's mark
        return _cut_safetensors(path, size)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in place of the weights: run `git lfs pull` there, or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page (HTML) in place of the weights: download the file itself, not the page about it"
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it, and give the checkpoint in it"
    if kind == ZIP or head.startswith(b"PK\x05\x06"):
        return _odd_zip(path, size)
    if not any(head):
        return f"{size} bytes that begin with zeros: the download was not finished; fetch it again"
    if kind == PICKLE:
        return None
    if _TEXT_PICKLE.match(head):
        return "a pickle of the oldest kind, which could run code: the weights are wanted, as .safetensors"
    if _is_text(head):
        return f"a text file that begins {head[:40].decode(errors='replace')!r}: the weights themselves are wanted"
    return f"{size} bytes that begin {head[:8]!r}: neither safetensors nor a PyTorch checkpoint"


def _odd_zip(path: Path, size: int) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            return f"cut off after {size} bytes (a zip archive without its end): fetch it again"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # a damaged directory makes the reader raise almost anything
        return f"a damaged zip archive ({error or type(error).__name__}): fetch it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, which is code: the state_dict() is wanted, as .safetensors or .pth"
    if any(name.endswith("/data.pkl") for name in names):
        return None
    holds = ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"a zip archive that is not a checkpoint (it holds {holds or 'nothing'}): unpack it, and give the checkpoint"


def _cut_safetensors(path: Path, size: int) -> str | None:
    """An error text if a safetensors file ends before its tensors do, else None."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    try:
        entries = json.loads(header) if len(header) == length else None
        ends = [entry["data_offsets"][1] for name, entry in (entries or {}).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None  # the library reports what is wrong with the header
    if size < wanted:
        return f"cut off: {size} bytes of {wanted} or more; fetch it again"
    return None


def _is_text(head: bytes) -> bool:
    try:
        text = head[:256].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < 250:
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)
