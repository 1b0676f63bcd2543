"""The number formats that this machine's processor multiplies fast, from the system's list of CPU features."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

__all__ = ["SLOW_BF16", "flags", "has_bf16", "int8_products"]

SLOW_BF16 = "this processor does not multiply bf16 directly: fp32 is many times faster"

CPUINFO = Path("/proc/cpuinfo")
X86 = ("x86_64", "amd64")


@cache
def flags() -> frozenset[str] | None:
    """The instruction sets of the first processor, by Linux's names; None on a system that does not list them."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    named = (line.partition(":") for line in lines)
    found = next((words for name, _, words in named if name.strip().lower() in ("flags", "features")), None)
    return None if found is None else frozenset(found.lower().split())


def has_bf16() -> bool | None:
    """Whether the processor can multiply bfloat16 (AMX, AVX512-BF16, Arm's BF16); None: unknown.

    Other processors convert bfloat16 to float32 first, which is many times slower than using float32 directly.
    """
    found = flags()
    return None if found is None else not found.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


def int8_products() -> str:
    """How ONNX Runtime multiplies 8-bit integers here, in words (see `higen.backends.sessions`)."""
    if platform.machine().lower() not in X86:
        return "signed by signed"
    found = flags()
    if found is None:
        return "unsigned by signed (with VNNI), otherwise unsigned by unsigned"
    if found.isdisjoint({"avx512_vnni", "avx_vnni"}):
        return "unsigned by unsigned (same results, but slower without VNNI)"
    return "unsigned by signed (with VNNI)"
