"""A client of the Triton model `higen` over gRPC: it sends one request and yields its events."""

from __future__ import annotations

import os
import queue
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.engines.triton.interface import COMMON_INPUTS, STOPPING
from higen.errors import BackendError, Cancelled, HigenError, MissingExtra, RequestError, RetryLater
from higen.request import UNSPECIFIED

__all__ = ["request_tensors", "stream"]

Tensors = dict[str, tuple[str, NDArray[Any]]]

_STATUS: dict[str, type[HigenError]] = {
    "StatusCode.INVALID_ARGUMENT": RequestError,
    "StatusCode.UNAVAILABLE": RetryLater,
    "StatusCode.CANCELLED": Cancelled,
}
"""The error for each status of a broken stream."""

_NAMED: dict[str, type[HigenError]] = {kind.__name__: kind for kind in (RequestError, RetryLater, Cancelled)}
"""The error for the name that messages of `higen` begin with."""

_UNFIT = re.compile(r"\binput '")
"""Found in Triton's message about an unknown input, or one of another type or rank."""

_DTYPES = {
    "UINT64": np.uint64,
    "INT32": np.int32,
    "FP32": np.float32,
    "FP64": np.float64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
_TAKES = {"UINT64": "iu", "INT32": "iu", "FP32": "iuf", "FP64": "iuf", "UINT8": "iu", "BOOL": "b"}
"""The numpy kinds that each data type accepts. Values are never rounded to whole numbers, only to fewer digits."""


def stream(url: str, prompt: str, *, timeout: float | None = None, **options: Any) -> Iterator[dict[str, Any]]:
    """Events of a request (interface.py) as dictionaries: texts as str, single numbers as int, others as arrays.

        for event in stream("127.0.0.1:8001", "a whale", seed=7, preview_every=4):
            print(event["event"], event.get("loop"), event.get("step"))

    `options`: see `request_tensors`. `timeout`: seconds until the next event. Closing the iterator cancels the request
    on the server. Raises RequestError (wrong arguments, checked by the server), RetryLater (the server is full,
    stopping or absent: the same request may be sent again), Cancelled or BackendError.
    """
    try:
        import tritonclient.grpc as grpc
        from tritonclient.utils import InferenceServerException
    except ImportError as missing:
        raise MissingExtra("tritonclient", "triton", "the Triton client") from missing

    inputs = []
    for name, (kind, array) in request_tensors(prompt, **options).items():
        tensor = grpc.InferInput(name, list(array.shape), kind)
        inputs.append(tensor.set_data_from_numpy(array))
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = grpc.InferenceServerClient(url)
    ended = False
    try:
        # The header triton_grpc_error is not sent. With it an error has a status and ends the stream, and this
        # sometimes crashes the server (Triton 2.51). The error's message has the same information.
        client.start_stream(lambda result, error: answers.put((result, error)))
        with suppress(InferenceServerException):  # the stream has ended already; the reason is among the answers
            client.async_stream_infer("higen", inputs, enable_empty_final_response=True)
        while True:
            try:
                result, error = answers.get(timeout=timeout)
            except queue.Empty:
                raise RetryLater(f"{url}: no answer within {timeout} s") from None
            ended = error is not None or result.get_response().parameters["triton_final_response"].bool_param
            if error is not None:
                raise _error(client, url, error)
            answer = result.get_response()
            if answer.outputs:
                yield {out.name: _plain(result.as_numpy(out.name)) for out in answer.outputs}
            if ended:
                return
    finally:
        client.stop_stream(cancel_requests=not ended)
        client.close()


def _error(client: Any, url: str, error: Any) -> HigenError:
    """Triton's error as one of ours."""
    message = str(error.message())
    name, _, text = message.partition(": ")
    if name in _NAMED:
        return _NAMED[name](f"{url}: {text}")
    if str(error.status()) in _STATUS:
        return _STATUS[str(error.status())](f"{url}: {message}")
    if any(words in message for words in STOPPING):
        return RetryLater(f"{url}: {message}")
    if _UNFIT.search(message):
        taken = [f"{i.name} {i.datatype} {list(i.shape)}" for i in client.get_model_metadata("higen").inputs]
        return RequestError(f"{url}: {message}; the model takes {', '.join(taken)}")
    return BackendError(f"{url}: {message}")


def _plain(array: NDArray[Any]) -> Any:
    if array.shape != (1,):
        return array
    return array[0].decode() if array.dtype == np.object_ else array.tolist()[0]


def request_tensors(prompt: str, **options: Any) -> Tensors:
    """Each given input with its data type in Triton's protocol ("BYTES" for texts) and its array.

    Options that every model has are sent in their data type (interface.py: COMMON_INPUTS). All others are controls,
    which only the server knows. The type of the value decides how they are sent:

        a number, or a list of them           FP32 [n]
        a matrix of numbers                   FP32 [rows, columns], to the input NAME_matrix
        "unspecified"                         FP32 [0]
        another text                          one text
        whole numbers [H,W,3] or [F,H,W,3]    UINT8: a picture, or a clip or mask
        {index: picture}                      known frames, to NAME or NAME_file, and NAME_index
        bytes, or a path (os.PathLike)        a PNG or JPEG file, to the input NAME_file

    None is not sent and means the model's default. Raises RequestError for a value that its data type cannot hold.
    """
    common = {field.name: field.kind for field in COMMON_INPUTS}
    tensors: Tensors = {}
    for name, value in {"prompt": prompt, **options}.items():
        if value is None and name != "prompt":
            continue
        if name not in common:
            tensors |= _control(name, value)
        elif common[name] == "STRING":
            tensors[name] = ("BYTES", _texts(name, value))
        else:
            tensors[name] = (common[name], _array(name, common[name], value).reshape(-1))
    return tensors


def _control(name: str, value: Any) -> Tensors:
    if isinstance(value, str):
        unspecified = value == UNSPECIFIED
        return {name: ("FP32", np.zeros(0, np.float32)) if unspecified else ("BYTES", _texts(name, value))}
    if isinstance(value, Mapping):
        return _known_frames(name, value)
    if isinstance(value, (bytes, os.PathLike)):
        return {f"{name}_file": ("BYTES", np.array([_file(name, value)], dtype=np.object_))}
    rank = np.asarray(value).ndim if _is_regular(value) else 0
    if rank > 2 or (rank == 2 and getattr(value, "dtype", None) == np.uint8):
        pixels = _array(name, "UINT8", value)
        if rank == 2 or rank > 4 or pixels.shape[-1] != 3:
            raise RequestError(f"{name} has shape {list(pixels.shape)}: a picture is [H,W,3], a clip [F,H,W,3]")
        return {name: ("UINT8", pixels)}
    numbers = _array(name, "FP32", value)
    return {f"{name}_matrix": ("FP32", numbers)} if rank == 2 else {name: ("FP32", numbers.reshape(-1))}


def _known_frames(name: str, value: Mapping[Any, Any]) -> Tensors:
    """The inputs of known frames. The pictures by index are all files, or all arrays of one size."""
    indices = {f"{name}_index": ("INT32", _array(f"{name}_index", "INT32", [*value]).reshape(-1))}
    pictures = [*value.values()]
    if pictures and all(isinstance(one, (bytes, os.PathLike)) for one in pictures):
        files = np.array([_file(name, one) for one in pictures], dtype=np.object_)
        return {f"{name}_file": ("BYTES", files), **indices}
    if not _is_regular(pictures) or np.asarray(pictures).ndim != 4:
        raise RequestError(f"{name}: a picture for each index: files, or arrays [H,W,3] of one size")
    return {name: ("UINT8", _array(name, "UINT8", pictures)), **indices}


def _file(name: str, value: bytes | os.PathLike[str]) -> bytes:
    try:
        return value if isinstance(value, bytes) else Path(value).read_bytes()
    except OSError as error:
        raise RequestError(f"{name}={os.fspath(value)!r}: cannot be read: {error}") from error


def _texts(name: str, value: Any) -> NDArray[Any]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name}={reprlib.repr(value)}: a text is wanted")
    try:
        return np.array([text.encode() for text in texts], dtype=np.object_)
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: not valid Unicode: {error.reason}") from error


def _is_regular(value: Any) -> bool:
    """Whether numpy can make an array of it: False for lists of different lengths."""
    try:
        np.asarray(value)
    except ValueError:
        return False
    return True


def _array(name: str, kind: str, value: Any) -> NDArray[Any]:
    """The value as an array of its data type. Raises RequestError for a value that does not fit."""
    wrong = RequestError(f"{name}={reprlib.repr(value)}: {kind} is wanted")
    if not _is_regular(value):
        raise wrong
    array, dtype = np.asarray(value), np.dtype(_DTYPES[kind])
    if array.size and array.dtype.kind not in _TAKES[kind]:
        raise wrong
    if array.size and array.dtype.kind in "iu":
        low, high = (-(2**24), 2**24) if dtype.kind == "f" else (np.iinfo(dtype.name).min, np.iinfo(dtype.name).max)
        if int(array.min()) < low or int(array.max()) > high:
            raise RequestError(f"{wrong}; its data type holds whole numbers from {low} to {high}")
    with np.errstate(over="ignore"):  # the server refuses what is not finite
        return array.astype(dtype)
