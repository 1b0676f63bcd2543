"""What the Triton model `higen` takes and gives: one table for its configuration, for reading requests, for clients.

A request's answer is a stream of events. Each has the text `event`, and of the other outputs those that it needs:

    progress   stage, step (from 1), total                            after each denoising step
    preview    stage, step, total, first 0, frames or images          every `preview_every` steps
    frames     first, frames or images                                as the result is decoded, a few at a time
    done       metadata (JSON), and latents if they were asked for    the last one
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.errors import RequestError

__all__ = ["INPUTS", "OUTPUTS", "Delivery", "Field", "pictures", "read_request", "request_tensors"]


@dataclass(frozen=True)
class Field:
    """An input or output; `kind` is Triton's data type without TYPE_, `dims` has -1 where any size goes."""

    name: str
    kind: str
    dims: tuple[int, ...] = (1,)


INPUTS = (
    Field("prompt", "STRING"),
    Field("negative_prompt", "STRING"),
    Field("seed", "UINT64"),
    Field("steps", "INT32", (-1,)),  # one, or two: spatial and temporal stage
    Field("guidance", "FP32", (-1,)),
    Field("solver", "STRING"),
    Field("frames", "INT32"),
    Field("width", "INT32"),
    Field("height", "INT32"),
    Field("fps", "INT32"),
    Field("motion", "FP32", (-1,)),  # one, one per pair of frames, or one per frame
    Field("appearance", "FP32", (-1,)),  # one, or one per frame
    Field("offset_noise", "FP32"),
    Field("image", "UINT8", (-1, -1, 3)),  # a picture [H,W,3] instead of a drawn key frame
    Field("preview_every", "INT32"),  # a preview after every so many steps; 0: none
    Field("encoding", "STRING"),  # of pictures: "raw" (frames) or "png" (images)
    Field("return_latents", "BOOL"),
)
"""All but the prompt are optional: what is not given is the model's default."""

OUTPUTS = (
    Field("event", "STRING"),
    Field("stage", "STRING"),
    Field("step", "INT32"),
    Field("total", "INT32"),
    Field("first", "INT32"),  # place of the first picture of an event in the video
    Field("frames", "UINT8", (-1, -1, -1, 3)),  # [n, H, W, 3]
    Field("images", "STRING", (-1,)),  # [n] PNG files in base64
    Field("latents", "FP32", (-1, -1, -1, -1)),  # [C, F, H, W]
    Field("metadata", "STRING"),
)

ENCODINGS = ("raw", "png")
_DTYPES = {"UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32, "UINT8": np.uint8, "BOOL": np.bool_}
_TAKES = {"UINT64": "iu", "INT32": "iu", "FP32": "iuf", "UINT8": "iu", "BOOL": "b"}
"""The kinds of numpy's types whose values a data type may hold: nothing is rounded, but to fewer digits."""


@dataclass(frozen=True)
class Delivery:
    """How a request wants its result."""

    preview_every: int = 0
    encoding: str = "raw"
    return_latents: bool = False


def read_request(tensors: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Any], Delivery]:
    """The arguments of `Pipeline.stream` (prompt and image included), and how to deliver.

    `tensors` are the inputs by name, texts as bytes. Raises RequestError; what a pipeline checks is left to it.
    """
    _check_names(tensors)
    values = {name: _value(name, tensor) for name, tensor in tensors.items()}
    if not isinstance(values.get("prompt"), str):
        raise RequestError("prompt: one text is wanted")
    given = {name: values.pop(name) for name in ("preview_every", "encoding", "return_latents") if name in values}
    delivery = Delivery(**given)
    if type(delivery.preview_every) is not int or delivery.preview_every < 0:
        raise RequestError(f"preview_every={delivery.preview_every!r}: a whole number, 0 (none) or more")
    if delivery.encoding not in ENCODINGS:
        raise RequestError(f"encoding={delivery.encoding!r}: one of {', '.join(map(repr, ENCODINGS))}")
    if type(delivery.return_latents) is not bool:
        raise RequestError(f"return_latents={delivery.return_latents!r}: true or false")
    return values, delivery


def _check_names(given: Iterable[str]) -> None:
    known = [field.name for field in INPUTS]
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(f"{', '.join(unknown)}: unknown; a request takes {', '.join(known)}")


def _value(name: str, tensor: NDArray[Any]) -> Any:
    """A tensor as an argument: a single number or text as itself, several as a list, an image as it is."""
    if name == "image":
        return tensor
    items = [_text(name, item) if isinstance(item, (bytes, str)) else item for item in tensor.reshape(-1).tolist()]
    if not items:
        if name in ("motion", "appearance"):  # unspecified, for models that were trained for it
            return None
        raise RequestError(f"{name} is empty: at least one value")
    return items[0] if len(items) == 1 else items


def _text(name: str, item: bytes | str) -> str:
    try:
        return item if isinstance(item, str) else item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not valid UTF-8: {error.reason}") from error


def request_tensors(prompt: str, **options: Any) -> dict[str, tuple[str, NDArray[Any]]]:
    """For clients: each given input with its data type in Triton's protocol ("BYTES" for texts) and its array.

    None is left out: the model's default; for `motion` and `appearance` it is sent, as "unspecified". Raises
    RequestError for an unknown option or a value that its data type cannot hold.
    """
    fields = {field.name: field for field in INPUTS}
    tensors = {}
    _check_names(options)
    for name, value in {"prompt": prompt, **options}.items():
        kind = fields[name].kind
        if kind == "STRING" and isinstance(value, str):
            tensors[name] = ("BYTES", np.array([value.encode()], dtype=np.object_))
        elif value is None and name in ("motion", "appearance"):
            tensors[name] = (kind, np.zeros(0, np.float32))
        elif value is not None or name == "prompt":
            array = _array(name, kind, value)
            tensors[name] = (kind, array.reshape(-1) if name != "image" else array)
    return tensors


def _array(name: str, kind: str, value: Any) -> NDArray[Any]:
    """The value in its data type, unchanged."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise RequestError(f"{name}={value!r}: {kind} is wanted: {error}") from error
    if kind == "STRING" or (array.size and array.dtype.kind not in _TAKES[kind]):
        raise RequestError(f"{name}={value!r}: {kind} is wanted")
    dtype = np.dtype(_DTYPES[kind])
    if dtype.kind in "iu" and array.size:
        low, high = np.iinfo(dtype.name).min, np.iinfo(dtype.name).max
        if int(array.min()) < low or int(array.max()) > high:
            raise RequestError(f"{name}={value!r}: {kind} is wanted, from {low} to {high}")
    return array.astype(dtype)


def pictures(frames: NDArray[np.uint8], encoding: str) -> dict[str, NDArray[Any]]:
    """Frames uint8 [n,H,W,3] as the output that the encoding names."""
    if encoding == "raw":
        return {"frames": np.ascontiguousarray(frames)}
    return {"images": np.array([_png(frame) for frame in frames], dtype=np.object_)}


def _png(frame: NDArray[np.uint8]) -> bytes:
    import base64

    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(frame).save(file, "png")
    return base64.b64encode(file.getvalue())
