"""Inputs and outputs of the Triton model `higen`: one table for its configuration, its requests and its clients.

The inputs are COMMON_INPUTS, which every model has, and the controls of the model that the repository was written for.
An input that is not given has the model's default. A control is given by inputs of these names:

    kind                     input          data type, shape
    number, whole            NAME           FP32 [1]
    curve                    NAME           FP32 [n]: one number, F or F - 1 numbers; n = 0: "unspecified"
      encoded as similarity  NAME_matrix    FP32 [F, columns], in place of NAME
    text, choice             NAME           STRING [1]
    picture                  NAME           UINT8 [H, W, 3]
                             NAME_file      STRING [1]: a PNG or JPEG file, or its base64 text, in place of NAME
    clip                     NAME           UINT8 [F, H, W, 3]
    mask                     NAME           UINT8 [1 or F, H, W, 3]
                             NAME_file      STRING [1]: a picture as above, in place of NAME
    map                      NAME           UINT8 [1, F or more, H, W, 3]
                             NAME_file      STRING [n]: a picture each as above, in place of NAME
    frames                   NAME           UINT8 [n, H, W, 3], n known frames
                             NAME_file      STRING [n]: a picture each as above, in place of NAME
                             NAME_index     INT32 [n]: which frames they are, from 0, or from -1 for the last one on

Triton's HTTP endpoint takes flat lists only: pictures are sent as files there, and matrices and clips need gRPC.

A request's answer is a stream of events. Each has the text `event` and these other outputs:

    progress   loop, stage, step (from 1), total                         after each denoising step
    preview    loop, stage, step, total, first 0, frames or images       every `preview_every` steps
    frames     first, frames or images                                   as the result is decoded, a chunk at a time
    done       metadata (JSON), and latents if they were asked for       the last one
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from higen.errors import ModelError, RequestError, quoted
from higen.manifest import Manifest
from higen.request import MAX_PROMPT, UNSPECIFIED
from higen.tables import Control

if TYPE_CHECKING:
    import PIL.Image

_INDEX = "_index"
"""Suffix of the input with the frame indices of a control of kind frames."""

__all__ = ["COMMON_INPUTS", "OUTPUTS", "STOPPING", "Delivery", "Field", "inputs", "pictures", "read_request"]


@dataclass(frozen=True)
class Field:
    """An input or output. `kind` is Triton's data type without TYPE_. `dims` has -1 for any size.

    argument  the pipeline's argument that an input gives; several inputs may give one in different forms
    form      values: one or several numbers or texts; curve: likewise, none of them is "unspecified"; matrix; pixels;
              file: a picture file; files: several picture files; list: several numbers
    """

    name: str
    kind: str
    dims: tuple[int, ...] = (-1,)
    argument: str = ""
    form: Literal["values", "curve", "matrix", "pixels", "file", "files", "list"] = "values"


COMMON_INPUTS = (
    Field("prompt", "STRING"),
    Field("negative_prompt", "STRING"),
    Field("seed", "UINT64"),
    Field("steps", "INT32"),  # one, or one per loop
    Field("guidance", "FP32"),  # one, or one per loop
    Field("guidance_curve", "FP32"),  # one per frame, for loops over all frames
    Field("solver", "STRING"),  # one, or one per loop
    Field("guidance_interval", "FP64"),  # two, or two per loop
    Field("windows", "INT32"),  # 0, a length, or a length and a stride
    Field("window_noise", "STRING"),
    Field("free_init", "FP64"),  # iterations, stop frequencies in space and time, order
    Field("free_init_filter", "STRING"),
    Field("reuse", "INT32"),  # one, or one per loop
    Field("preset", "STRING"),
    Field("inversion", "STRING"),
    Field("frames", "INT32"),
    Field("width", "INT32"),
    Field("height", "INT32"),
    Field("fps", "INT32"),
    Field("preview_every", "INT32"),  # a preview after this many steps; 0: none
    Field("encoding", "STRING"),  # of the result: "raw" (output frames) or "png" (output images)
    Field("return_latents", "BOOL"),
)
"""Inputs of every model. Their shapes are free, so that a wrong number of values is refused here, with the reason."""

OUTPUTS = (
    Field("event", "STRING", (1,)),
    Field("loop", "STRING", (1,)),
    Field("stage", "STRING", (1,)),
    Field("step", "INT32", (1,)),
    Field("total", "INT32", (1,)),
    Field("first", "INT32", (1,)),  # index in the video of the event's first picture
    Field("frames", "UINT8", (-1, -1, -1, 3)),  # [n, H, W, 3]
    Field("images", "STRING", (-1,)),  # [n] PNG files in base64
    Field("latents", "FP32", (-1, -1, -1, -1)),  # [C, F, H, W]
    Field("metadata", "STRING", (1,)),
)

ENCODINGS = ("raw", "png")

MAX_PIXELS = 2**26
"""The largest number of pixels of a picture sent as a file: a small file can hold a huge picture."""

_FILES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
"""The first bytes of a PNG and of a JPEG file."""


STOPPING = ("Server not ready", "has no available versions")
"""Triton's messages about a model while the server stops. Their error code is the same as that of a failure."""


@dataclass(frozen=True)
class Delivery:
    """How the result is sent."""

    preview_every: int = 0
    encoding: str = "raw"
    return_latents: bool = False


def inputs(manifest: Manifest) -> tuple[Field, ...]:
    """The inputs of `higen` for a model. Raises ModelError if two inputs would have the same name."""
    fields = (*COMMON_INPUTS, *(field for control in manifest.controls for field in _fields(control)))
    names = [field.name for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"controls: {', '.join(twice)} is the name of another input of the Triton model: rename it")
    return fields


def _fields(control: Control) -> tuple[Field, ...]:
    name = control.name
    if control.kind == "picture":
        pixels = Field(name, "UINT8", (-1, -1, 3), name, "pixels")
        return pixels, Field(f"{name}_file", "STRING", (-1,), name, "file")
    clip = Field(name, "UINT8", (-1, -1, -1, 3), name, "pixels")
    if control.kind == "clip":
        return (clip,)
    if control.kind == "mask":
        return clip, Field(f"{name}_file", "STRING", (-1,), name, "file")
    if control.kind == "map":
        return clip, Field(f"{name}_file", "STRING", (-1,), name, "files")
    if control.kind == "frames":
        files = Field(f"{name}_file", "STRING", (-1,), name, "files")
        return clip, files, Field(f"{name}{_INDEX}", "INT32", (-1,), f"{name}{_INDEX}", "list")
    if control.kind != "curve":
        return (Field(name, "STRING" if control.kind in ("text", "choice") else "FP32", (-1,), name),)
    curve = Field(name, "FP32", (-1,), name, "curve")
    matrix = Field(f"{name}_matrix", "FP32", (-1, -1), name, "matrix")
    return (curve, matrix) if control.encoding == "similarity" else (curve,)


def read_request(manifest: Manifest, tensors: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Any], Delivery]:
    """The arguments of `Pipeline.stream`, with the prompt, and how to send the result.

    `tensors` are the inputs by name, texts as bytes. Raises RequestError. What the pipeline checks is not checked here.
    """
    fields = {field.name: field for field in inputs(manifest)}
    _check_names(tensors, fields)
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        argument = fields[name].argument or name
        if argument in values:
            both = ", ".join(n for n in tensors if (fields[n].argument or n) == argument)
            raise RequestError(f"{both}: one of them")
        values[argument] = _value(fields[name], tensor)
    if "guidance_curve" in values:
        values["guidance"] = _guidance(manifest, values.get("guidance"), values.pop("guidance_curve"))
    if not isinstance(values.setdefault("prompt", None if manifest.text else ""), str):
        raise RequestError("prompt: one text is wanted")
    for name in [control.name for control in manifest.controls if control.kind == "frames"]:
        pictures, indices = values.pop(name, None), values.pop(f"{name}{_INDEX}", None)
        if pictures is not None or indices is not None:
            values[name] = _by_index(name, pictures, indices)
    given = {name: values.pop(name) for name in ("preview_every", "encoding", "return_latents") if name in values}
    return values, _delivery(**given)


def _by_index(name: str, pictures: Any, indices: Any) -> dict[int, Any]:
    """Known frames by index."""
    if pictures is None or indices is None or len(pictures) != len(indices) or not len(indices):
        counts = f"{0 if pictures is None else len(pictures)} pictures, {len(indices or ())} in {name}{_INDEX}"
        raise RequestError(f"{name}: one index for each picture is wanted, not {counts}")
    found = dict(zip(indices, pictures, strict=True))
    if len(found) < len(indices):
        raise RequestError(f"{name}{_INDEX}={quoted(indices)}: each frame once")
    return found


def _guidance(manifest: Manifest, scales: Any, curve: Any) -> list[Any]:
    """One entry per loop: the curve for loops over all frames, else the loop's number in `scales`."""
    loops = manifest.loops
    each = scales if isinstance(scales, list) else [scales] * len(loops)
    if len(each) != len(loops):
        raise RequestError(f"guidance has {len(each)} numbers: one, or one per loop ({len(loops)})")
    curve = curve if isinstance(curve, list) else [curve]
    made = [one if loop.frames == 1 else curve for loop, one in zip(loops, each, strict=True)]
    return made[0] if len(made) == 1 else made


def _delivery(**given: Any) -> Delivery:
    delivery = Delivery(**given)
    if type(delivery.preview_every) is not int or delivery.preview_every < 0:
        raise RequestError(f"preview_every={delivery.preview_every!r}: a whole number, 0 (none) or more")
    if delivery.encoding not in ENCODINGS:
        raise RequestError(f"encoding={delivery.encoding!r}: one of {', '.join(map(repr, ENCODINGS))}")
    if type(delivery.return_latents) is not bool:
        raise RequestError(f"return_latents={delivery.return_latents!r}: true or false")
    return delivery


def _check_names(given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(f"{', '.join(unknown)}: unknown; a request takes {', '.join(known)}")


def _value(field: Field, tensor: NDArray[Any]) -> Any:
    """A tensor as an argument: a single number or text as a scalar, several as a list, pictures unchanged."""
    if field.form in ("pixels", "matrix"):
        return tensor
    flat = tensor.reshape(-1)
    if field.form == "file":
        return _picture(field.name, flat)
    if field.form == "files":
        return [_picture(f"{field.name}[{i}]", flat[i : i + 1]) for i in range(len(flat))]
    if field.form == "list":
        return flat.tolist()
    items = [_text(field.name, item) if isinstance(item, (bytes, str)) else item for item in flat.tolist()]
    if items:
        return items[0] if len(items) == 1 else items
    if field.form == "curve":
        return UNSPECIFIED
    raise RequestError(f"{field.name} is empty: at least one value")


def _text(name: str, item: bytes | str) -> str:
    if len(item) > 4 * MAX_PROMPT:  # in UTF-8 a character has at most 4 bytes
        raise RequestError(f"{name} has {len(item)} bytes: at most {MAX_PROMPT} characters")
    try:
        return item if isinstance(item, str) else item.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not valid UTF-8: {error.reason}") from error


def _picture(name: str, files: NDArray[Any]) -> PIL.Image.Image:
    """A picture from the bytes of a PNG or JPEG file, or from their base64 text. Its pixels are read later."""
    import PIL.Image

    wanted = f"{name}: one PNG or JPEG file, or its base64 text"
    data = files[0] if len(files) == 1 else b""
    data = data.encode() if isinstance(data, str) else data
    if not data.startswith(_FILES):
        try:
            data = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise RequestError(wanted) from error
    if not data.startswith(_FILES):
        raise RequestError(wanted)
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except Exception as error:  # a decoder may raise anything on corrupt data
        reason = "an incomplete file" if isinstance(error, PIL.UnidentifiedImageError) else error
        raise RequestError(f"{name}: cannot be read as a picture: {reason}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise RequestError(f"{name} has {picture.width}x{picture.height} pixels: at most {MAX_PIXELS} in all")
    return picture


def pictures(frames: NDArray[np.uint8], encoding: str) -> dict[str, NDArray[Any]]:
    """Frames uint8 [n,H,W,3] as the output that the encoding names."""
    if encoding == "raw":
        return {"frames": np.ascontiguousarray(frames)}
    return {"images": np.array([_png(frame) for frame in frames], dtype=np.object_)}


def _png(frame: NDArray[np.uint8]) -> bytes:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(frame).save(file, "png")
    return base64.b64encode(file.getvalue())
