"""What a benchmark says about the machine it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess

import torch

import higen


def hardware() -> str:
    """The GPU, its driver, and the versions of what runs on it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else ""
    versions = [f"Python {platform.python_version()}", f"higen {higen.__version__}"]
    for package in ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{gpu or 'no GPU'}; {', '.join(versions)}"


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
