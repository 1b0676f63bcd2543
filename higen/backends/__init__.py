"""Backends run stages. They share one interface: `Backend.run(stage, **tensors)`."""

from higen.backends.base import Backend, RecordingBackend

__all__ = ["Backend", "RecordingBackend"]
