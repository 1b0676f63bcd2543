"""A client of the Triton model `higen` over gRPC: one request, its events as they come."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from higen.engines.triton.interface import request_tensors
from higen.errors import BackendError, Cancelled, HigenError, MissingExtra, RequestError, RetryLater

__all__ = ["stream"]

_ERRORS: dict[str, type[HigenError]] = {
    "StatusCode.INVALID_ARGUMENT": RequestError,
    "StatusCode.UNAVAILABLE": RetryLater,
    "StatusCode.CANCELLED": Cancelled,
}


def stream(url: str, prompt: str, *, timeout: float | None = None, **options: Any) -> Iterator[dict[str, Any]]:
    """Events of a request (interface.py) as dictionaries: texts as str, single numbers as int, others as arrays.

        for event in stream("127.0.0.1:8001", "a whale", seed=7, preview_every=4):
            print(event["event"], event.get("step"))

    `timeout`: seconds until the next event. Closing the iterator cancels the request on the server.
    Raises RequestError (wrong arguments, checked by the server), RetryLater (full, stopping or not there: the same
    request may be sent again), Cancelled or BackendError.
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
    try:
        client.start_stream(
            lambda result, error: answers.put((result, error)),
            headers={"triton_grpc_error": "true"},  # status codes instead of messages alone
        )
        with suppress(InferenceServerException):  # the stream has ended already; why, comes as an answer
            client.async_stream_infer("higen", inputs, enable_empty_final_response=True)
        while True:
            try:
                result, error = answers.get(timeout=timeout)
            except queue.Empty:
                raise RetryLater(f"{url}: no answer within {timeout} s") from None
            if error is not None:
                raise _ERRORS.get(str(error.status()), BackendError)(f"{url}: {error.message()}")
            answer = result.get_response()
            if answer.outputs:
                yield {out.name: _plain(result.as_numpy(out.name)) for out in answer.outputs}
            if answer.parameters["triton_final_response"].bool_param:
                return
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def _plain(array: np.ndarray[Any, Any]) -> Any:
    if array.shape != (1,):
        return array
    return array[0].decode() if array.dtype == np.object_ else array.tolist()[0]
