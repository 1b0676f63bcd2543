"""Backends run stages. One seam: `Backend.run(stage, **tensors)`."""

from higen.backends.base import Backend, RecordingBackend

__all__ = ["Backend", "RecordingBackend"]
