"""Every error that higen raises on purpose.

HigenError
├── RequestError (ValueError)     an argument of a generation request is wrong
├── OutputError (ValueError)      a file cannot be written or read as asked: suffix, folder, format
├── ModelError                    a model directory cannot be used
│   ├── ManifestError             its higen.json is missing, malformed or of a newer version
│   ├── IntegrityError            one of its files is missing, truncated or altered
│   ├── CheckpointError           a released checkpoint does not fit the architecture
│   └── UnknownFamily             the model's family is not installed here
├── BackendError                  a backend failed
│   ├── OutOfMemory               there is too little memory; the files are whole
│   ├── BackendUnavailable        a backend cannot run here; the message says why
│   │   └── UnknownDevice         the given value is not a device name (a RequestError too)
│   └── EngineError               a TensorRT engine cannot be built or used
│       ├── NoDriver              there is no NVIDIA driver
│       ├── NoDevice              there is a driver and no GPU
│       ├── WrongArchitecture     it was built for other GPUs
│       ├── OutsideProfile        it was built for other shapes
│       ├── Malformed             its file is not a plan that this TensorRT can read
│       └── Stale                 it was built from another graph, other weights or by another TensorRT
├── PlanError                     a story cannot be planned: the endpoint failed or its answer is unusable
├── Cancelled                     a request was cancelled before its end
├── RetryLater                    a server is full or is stopping: the same request may be sent again
├── ServeError                    a server cannot start: its port, folder or queue cannot be used
├── NotPicklable (PicklingError)  an object cannot be sent to another process; the message says what to do instead
├── FixtureError                  a fixture directory for `higen parity` is malformed
├── TrainingError                 a training run cannot start, continue or save
│   └── SettingsError             its settings or its data set are wrong
└── MissingExtra (ImportError)    an optional dependency is not installed; the message names the extra

PromptWarning (UserWarning)       a prompt was cut or has words that the model does not know
PictureWarning (UserWarning)      a picture of another size or length was made to fit
FallbackWarning (UserWarning)     a stage runs on a slower backend than the best one present
MediaWarning (UserWarning)        a sound or clip was cut, padded or sampled differently than requested

Messages quote values with `quoted`, which gives one short line. If a message is still too long, its middle is cut out.
"""

from __future__ import annotations

import pickle
import re
import reprlib
import sys
from typing import Any

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "FallbackWarning",
    "FixtureError",
    "HigenError",
    "IntegrityError",
    "Malformed",
    "ManifestError",
    "MediaWarning",
    "MissingExtra",
    "ModelError",
    "NoDevice",
    "NoDriver",
    "NotPicklable",
    "OutOfMemory",
    "OutputError",
    "OutsideProfile",
    "PictureWarning",
    "PlanError",
    "PromptWarning",
    "RequestError",
    "RetryLater",
    "ServeError",
    "SettingsError",
    "Stale",
    "TrainingError",
    "UnknownDevice",
    "UnknownFamily",
    "WrongArchitecture",
    "is_of_a_handler",
    "one_line",
    "quoted",
    "raised_in",
]

_OURS = ("higen", "av", "PIL", "numpy", "onnxruntime", "torch")

LINE = 120
"""The most characters of a value that a message quotes."""

LONGEST = 1900
"""The most characters of a message."""


class _Quotes(reprlib.Repr):
    """The length limits of `quoted`; also handles integers that are too long for Python to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = LINE - 20
        self.maxlong = self.maxlist = self.maxtuple = self.maxdict = self.maxset = 24
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """As in reprlib."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            return f"<a whole number of {x.bit_length()} bits>"


_QUOTES = _Quotes()


def quoted(value: object) -> str:
    """A value as it is quoted in messages: its repr, in one line of at most 120 characters."""
    return _cut(one_line(_QUOTES.repr(value)), LINE)


def one_line(text: object) -> str:
    """A text in one line, for a message inside another message: a file's name may have line breaks."""
    return re.sub(r"\s*\n\s*", " ", str(text))


def raised_in(error: BaseException) -> str:
    """The name of the module that raised an error; an empty text if it is unknown."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace else ""


def is_of_a_handler(error: BaseException) -> bool:
    """Whether an error that came up inside a library call was raised by the user's own code.

    Such code is a signal handler, for example for a time limit. Its error is passed on and is not reported as a failure
    of the library.
    """
    where = raised_in(error)
    root = where.partition(".")[0]
    foreign = bool(where) and root not in _OURS and root not in sys.stdlib_module_names
    kind = type(error).__module__.partition(".")[0]
    return foreign and (kind not in ("builtins", *_OURS) or isinstance(error, TimeoutError))


def _cut(text: str, most: int = LONGEST) -> str:
    """A text cut to at most this many characters; the middle is left out."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


class HigenError(Exception):
    """The root of all errors raised by higen."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(_cut(a) if isinstance(a, str) else a for a in arguments))


class RequestError(HigenError, ValueError):
    """An argument of a generation request is wrong."""


class OutputError(HigenError, ValueError):
    """A file cannot be written or read as asked."""


class ModelError(HigenError):
    """A model directory cannot be used."""


class ManifestError(ModelError):
    """The manifest higen.json is missing, malformed or of a newer version."""


class IntegrityError(ModelError):
    """A file of a model directory is missing, truncated or altered."""


class CheckpointError(ModelError):
    """A released checkpoint does not fit the architecture."""


class UnknownFamily(ModelError):
    """The model's family is not installed: its networks cannot be built, but its graphs still run."""


class BackendError(HigenError):
    """A backend failed."""


class OutOfMemory(BackendError):
    """There is too little memory for a model or a request."""


class BackendUnavailable(BackendError):
    """A backend cannot run on this machine or for this model."""


class UnknownDevice(BackendUnavailable, RequestError):
    """The given value is not a device name."""


class EngineError(BackendError):
    """A TensorRT engine cannot be built or used."""


class NoDriver(EngineError):
    """There is no NVIDIA driver on this machine."""


class NoDevice(EngineError):
    """There is an NVIDIA driver, but no GPU that it can use."""


class WrongArchitecture(EngineError):
    """An engine was built for other GPUs than the one here."""


class OutsideProfile(EngineError):
    """An engine was built for other shapes than those asked for."""


class Malformed(EngineError):
    """An engine's file, or the record next to it, is truncated, altered or not readable by this TensorRT."""


class Stale(EngineError):
    """An engine was built from another graph, from other weights or by another TensorRT version."""


class PlanError(HigenError):
    """A story cannot be planned: the endpoint failed or its answer is unusable."""


class Cancelled(HigenError):
    """A request was cancelled before its end."""


class RetryLater(HigenError):
    """A server is full or is stopping: the same request may be sent again."""


class ServeError(HigenError):
    """A server cannot start: its port, folder or queue cannot be used."""


class NotPicklable(HigenError, pickle.PicklingError):
    """An object cannot be sent to another process."""


class FixtureError(HigenError):
    """A fixture directory is malformed."""


class TrainingError(HigenError):
    """A training run cannot start, continue or save."""


class SettingsError(TrainingError):
    """The settings or the data set of a training run are wrong."""


class MissingExtra(HigenError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'higen[{extra}]'")
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, for example between processes, as the constructor's arguments, not as the message."""
        return type(self), (self.package, self.extra, self.purpose)


class _OurWarning(UserWarning):
    """A warning with a limited message length, as errors have."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(_cut(a) if isinstance(a, str) else a for a in arguments))


class PromptWarning(_OurWarning):
    """A prompt was cut to the context window or has words that the model does not know."""


class PictureWarning(_OurWarning):
    """A picture, a mask or a clip was made to fit the request."""


class FallbackWarning(_OurWarning):
    """A stage runs on a slower backend than the best one present."""


class MediaWarning(_OurWarning):
    """A sound or clip was cut, padded or sampled differently than requested."""
