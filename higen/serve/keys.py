"""API keys: a file of names and SHA-256 digests, one key per line. The key itself is shown once and not stored.

    NAME sha256:<64 hexadecimal digits>

A key has 256 random bits, so it cannot be found from its digest by trying keys. No salt is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from higen.errors import RequestError, quoted
from higen.staging import whole_file

__all__ = ["add_key", "digest", "read_keys"]

_LINE = re.compile(r"([A-Za-z0-9_.\-]{1,64})\s+sha256:([0-9a-f]{64})")
_MOST = 10_000


def digest(key: str) -> str:
    """The SHA-256 digest of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> Mapping[str, str]:
    """Names by digest. Raises RequestError if the file cannot be read, has no key, or has a line that is not a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"api-keys={quoted(str(path))}: cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line.strip())
        if parts is None or parts[2] in found or parts[1] in found.values():
            raise RequestError(f"{path}, line {number}: NAME sha256:DIGEST, each name and key once")
        found[parts[2]] = parts[1]
    if not found or len(found) > _MOST:
        raise RequestError(f"{path} has {len(found)} keys: from 1 to {_MOST}; `--new-key NAME` makes one")
    return found


def add_key(path: Path, name: str) -> str:
    """Make a key, add its digest to the file, and return the key. Raises RequestError.

    The file is made readable for its owner only.
    """
    known = read_keys(path) if path.exists() and path.stat().st_size else {}
    if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", name) or name in known.values():
        raise RequestError(f"new-key={quoted(name)}: a new name of letters, digits, '_', '.' and '-'")
    key = f"hg-{secrets.token_urlsafe(32)}"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    try:
        with whole_file(path) as part:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{before}{name} sha256:{digest(key)}\n")
    except OSError as error:
        raise RequestError(f"api-keys={quoted(str(path))}: cannot be written: {error.strerror}") from error
    return key
