"""Schemas of the answers (OpenAI's with extensions), and of the request for the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from higen.free_init import FILTERS
from higen.loop_settings import MAX_REUSE
from higen.serve.settings import Limits
from higen.serve.store import Job
from higen.tables import WINDOW_NOISE

__all__ = [
    "REFUSALS",
    "REMIX",
    "Deleted",
    "ErrorBody",
    "ModelObject",
    "Models",
    "Page",
    "VideoObject",
    "create_body",
    "video_object",
]


class JobError(BaseModel):
    """Why a video was not made."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A job. A cancelled job has the status failed and the error code "cancelled". The fields from `seed` on are
    extensions: the values of the request, None for the model's default. `files`: the controls with a file."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: JobError | None = None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    seed: int
    num_frames: int
    fps: int
    negative_prompt: str | None = None
    num_inference_steps: int | list[Any] | None = None
    guidance_scale: float | list[Any] | None = None
    solver: str | list[Any] | None = None
    preset: str | None = None
    controls: dict[str, Any]
    files: list[str]
    metadata: dict[str, Any] | None = None


class Page(BaseModel):
    """One page of the list of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A deleted video."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ModelObject(BaseModel):
    """A model. `controls` is the JSON schema of `controls` in a request. It and the later fields are extensions.

    `usual_preset`: the one of `presets` that a request uses if it gives nothing that chooses how to draw.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "higen"
    licence: str
    controls: dict[str, Any]
    prompts: list[str]
    words: list[str] | None
    sizes: dict[str, Any]
    loops: list[dict[str, Any]]
    presets: list[str]
    usual_preset: str | None


class Models(BaseModel):
    """All models, the default one first."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class ErrorDetail(BaseModel):
    """The description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The answer to every refused request."""

    error: ErrorDetail


_MEANINGS = {
    400: "The request cannot be parsed",
    401: "A key is missing or unknown",
    403: "The page or host may not call this server",
    404: "No such video, model or address",
    405: "This address does not take this method",
    408: "The body came too slowly",
    409: "The video is not finished, or the Idempotency-Key was used for another request",
    410: "The video has expired",
    413: "The body is too large",
    415: "The body has the wrong content type",
    422: "A field, value or control is wrong",
    429: "Too many jobs or streams of this key",
    500: "The server failed",
    503: "The server is full or stopping",
    507: "The server's disk is full",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}


def video_object(job: Job, progress: int, files: list[str]) -> VideoObject:
    """A job as the API answers it. `progress`: percent, while it runs. `files`: the controls with a file."""
    request = job.request
    failed = job.status in ("failed", "cancelled")
    finished = job.finished is not None
    return VideoObject(
        id=job.id,
        model=job.model,
        status="failed" if failed else job.status,  # type: ignore[arg-type] # the others are those of the queue
        progress=100 if job.status == "completed" else progress,
        created_at=int(job.created),
        completed_at=int(job.finished or 0) if finished else None,
        expires_at=int(job.expires or 0) if finished else None,
        error=JobError(code=job.error_code or "", message=job.error_message or "") if failed else None,
        prompt=request["prompt"],
        seconds=f"{request['frames'] / request['fps']:g}",
        size=f"{request['width']}x{request['height']}",
        remixed_from_video_id=job.remixed,
        seed=request["seed"],
        num_frames=request["frames"],
        fps=request["fps"],
        negative_prompt=request.get("negative_prompt"),
        num_inference_steps=request.get("steps"),
        guidance_scale=request.get("guidance"),
        solver=request.get("solver"),
        preset=request.get("preset"),
        controls=request["controls"],
        files=files,
        metadata=None if job.metadata is None else dict(job.metadata),
    )


_NUMBERS = {"anyOf": [{"type": "number", "minimum": 0}, {"type": "array", "items": {"type": "number", "minimum": 0}}]}


def _word(words: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "string", "enum": list(words)}


def _properties(limits: Limits) -> dict[str, Any]:
    steps = {"type": "integer", "minimum": 1, "maximum": limits.steps}
    every = {"type": "integer", "minimum": 1, "maximum": MAX_REUSE}
    return {
        "prompt": {"type": "string", "description": "What the video shows.", "maxLength": 100_000},
        "model": {"type": "string", "description": "One of /v1/models. The default is the first one."},
        "seconds": {
            "anyOf": [{"type": "string"}, {"type": "number"}],
            "description": "Length; num_frames gives it exactly.",
        },
        "size": {"type": "string", "pattern": "^[1-9][0-9]{0,5}x[1-9][0-9]{0,5}$", "description": "WIDTHxHEIGHT."},
        "negative_prompt": {"type": "string", "description": "What the video should not show."},
        "num_frames": {"type": "integer", "minimum": 1, "maximum": limits.frames},
        "fps": {"type": "integer", "minimum": 1, "maximum": 240},
        "num_inference_steps": {
            "anyOf": [steps, {"type": "array", "items": steps}],
            "description": "One number, or one for each loop of the model.",
        },
        "guidance_scale": {
            "anyOf": [_NUMBERS, {"type": "array", "items": _NUMBERS}],
            "description": "One number, or one for each loop; a loop over frames takes a list, one per frame.",
        },
        "guidance_interval": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "description": "Start and end of the steps with guidance, such as 0.2 and 0.8; or two for each loop.",
        },
        "windows": {
            "anyOf": [{"type": "integer", "minimum": 0}, {"type": "array", "items": {"type": "integer", "minimum": 1}}],
            "description": "A long clip is made in windows: [length, stride] in frames; 0: all frames at once.",
        },
        "window_noise": {**_word(WINDOW_NOISE), "description": "The initial noise of a clip in windows."},
        "free_init": {
            **_NUMBERS,
            "description": "FreeInit: iterations, stop frequencies (space, time), order of the filter.",
        },
        "free_init_filter": {**_word(FILTERS), "description": "The filter of free_init."},
        "reuse": {
            "anyOf": [every, {"type": "array", "items": every}],
            "description": "N: only every N-th step runs the whole network, the others reuse its features. One number, "
            "or one for each loop.",
        },
        "preset": {
            "type": "string",
            "description": "A preset of the model; it sets what the request leaves out. A request that gives only "
            "prompt, seed, length and size has the model's usual preset.",
        },
        "inversion": {
            "type": "string",
            "description": "A text that describes the picture or clip to start from: it is inverted into noise.",
        },
        "solver": {"type": "string", "description": "A solver of the model's loops."},
        "seed": {"type": "integer", "minimum": -1, "description": "Same seed, same video; -1 draws one."},
        "controls": {"type": "object", "description": "The model's own controls: /v1/models has their schema."},
    }


def create_body(limits: Limits) -> dict[str, Any]:
    """The OpenAPI schema of the request body for a new video."""
    properties = _properties(limits)
    reference = {
        "anyOf": [
            {"type": "string", "description": "A data URL."},
            {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]},
        ]
    }
    in_json = {**properties, "input_reference": reference}
    in_form = {**properties, "input_reference": {"type": "string", "format": "binary"}}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": _object(in_json, ["prompt"])},
            "multipart/form-data": {"schema": _object(in_form, ["prompt"])},
        },
    }


REMIX: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"prompt": {"type": "string"}},
                "required": ["prompt"],
                "additionalProperties": False,
            }
        }
    },
}


def _object(properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}
