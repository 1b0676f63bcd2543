"""The endpoints of videos."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from higen.serve.asks import check
from higen.serve.catalog import Catalog, Served
from higen.serve.fields import Fields, read_fields
from higen.serve.live import Live
from higen.serve.metrics import Metrics
from higen.serve.refusals import Refusal, to_json
from higen.serve.results import IDS, VARIANTS, Results
from higen.serve.schema import REMIX, Deleted, Page, VideoObject, create_body, video_object
from higen.serve.settings import Settings
from higen.serve.store import DONE, Draft, Job, Store
from higen.serve.worker import Worker

__all__ = ["Parts", "video_routes"]

HEARTBEAT = 10.0
"""Seconds after which a silent event stream gets a comment, so that clients see that it is alive."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class Parts:
    """The parts of the server that the endpoints use."""

    settings: Settings
    catalog: Catalog
    store: Store
    results: Results
    live: Live
    worker: Worker
    metrics: Metrics


IdempotencyKey = Annotated[str | None, Header(description="The same key and request give the same job.")]
Format = Annotated[Literal["mp4", "webm", "gif", "webp"], Query(description="Format of the video.")]
MEDIA: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("video/mp4", "video/webm", "image/gif", "image/webp", "image/jpeg")
        },
    }
}
UPLOAD: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events: status, progress, preview, done.", "content": {"text/event-stream": {}}}
}


def video_routes(parts: Parts) -> APIRouter:
    """The endpoints below /v1/videos."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])
    jobs = _Jobs(parts)
    body = {"requestBody": create_body(parts.settings.limits)}

    @router.post("", openapi_extra=body, response_model=VideoObject)
    async def create(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
        """Ask for a video. It is made as soon as there is room; poll it, or follow its events."""
        job = await jobs.accept(request, idempotency_key)
        return _json(jobs.shown(job))

    @router.post("/sync", openapi_extra=body, responses=MEDIA, response_class=FileResponse)
    async def create_and_wait(
        request: Request,
        format: Format = "mp4",  # noqa: A002
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Ask for a video and wait for the file. If the client disconnects, the video is cancelled."""
        with parts.live.slot():
            job = await jobs.accept(request, idempotency_key)
            job = await jobs.finished(job, request.is_disconnected)
        if job.status != "completed":
            status = 422 if job.error_code == "invalid_request" else 503 if job.error_code == "out_of_memory" else 500
            status = 409 if job.status == "cancelled" else 507 if job.error_code == "storage_full" else status
            raise Refusal(status, job.error_code or "failed", f"{job.id}: {job.error_message}")
        return await jobs.file(job, format)

    @router.get("", response_model=Page)
    def list_videos(
        request: Request,
        after: Annotated[str | None, Query(description="The id of the last video of the previous page.")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Your videos, the newest first."""
        start = jobs.mine(request, after).number if after is not None else None
        found = parts.store.page(_owner(request), start, limit + 1, order == "asc")
        data = [jobs.shown(job).model_dump() for job in found[:limit]]
        ids = [row["id"] for row in data]
        page = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return Response(
            to_json({"object": "list", "data": data, **page, "has_more": len(found) > limit}),
            media_type="application/json",
        )

    @router.get("/{video_id}", response_model=VideoObject)
    def retrieve(request: Request, video_id: str) -> Response:
        """A video's state."""
        return _json(jobs.shown(jobs.mine(request, video_id)))

    @router.delete("/{video_id}", response_model=Deleted)
    def delete(request: Request, video_id: str) -> Deleted:
        """Remove a video. If it is being made, it is stopped at its next step."""
        job = jobs.mine(request, video_id)
        parts.store.delete(job.id)
        parts.worker.cancel(job.id)
        parts.results.remove(job.id)
        return Deleted(id=job.id)

    @router.post("/{video_id}/cancel", response_model=VideoObject)
    def cancel(request: Request, video_id: str) -> Response:
        """Cancel a video that waits or is being made. A video that has ended is not changed."""
        jobs.cancel(jobs.mine(request, video_id))
        return _json(jobs.shown(jobs.mine(request, video_id)))

    @router.get("/{video_id}/content", responses=MEDIA, response_class=FileResponse)
    async def content(
        request: Request,
        video_id: str,
        variant: Literal["video", "thumbnail", "spritesheet"] = "video",
        format: Format = "mp4",  # noqa: A002
    ) -> Response:
        """The finished video as a file, or a picture of it: thumbnail (webp), spritesheet (jpg)."""
        job = await run_in_threadpool(jobs.mine, request, video_id)
        return await jobs.file(job, variant if variant in VARIANTS else format)

    @router.get("/{video_id}/files/{control}", responses=UPLOAD, response_class=Response)
    def sent_file(request: Request, video_id: str, control: str) -> Response:
        """A file that was sent with the request, unchanged."""
        found = parts.store.uploads(jobs.mine(request, video_id).id).get(control)
        if found is None:
            raise Refusal(404, "file_not_found", "no file was sent for this control", "control")
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        return Response(found.data, media_type="application/octet-stream", headers=headers)

    @router.post("/{video_id}/remix", openapi_extra={"requestBody": REMIX}, response_model=VideoObject)
    async def remix(request: Request, video_id: str, idempotency_key: IdempotencyKey = None) -> Response:
        """Ask for a video with the request of an older video and another prompt."""
        return _json(jobs.shown(await jobs.remix(request, video_id, idempotency_key)))

    @router.get("/{video_id}/events", responses=EVENTS, response_class=StreamingResponse)
    async def events(
        request: Request,
        video_id: str,
        previews: Annotated[bool, Query(description="Send a preview after each step.")] = True,
        last_event_id: Annotated[str | None, Header(description="Continue after this event.")] = None,
    ) -> Response:
        """Server-sent events: progress, previews (PNG strips as data URLs), and `done` with the video object."""
        job = await run_in_threadpool(jobs.mine, request, video_id)
        seen = int(last_event_id) if last_event_id and re.fullmatch(r"[0-9]{1,9}", last_event_id) else 0
        stream = jobs.events(job, seen, previews)
        first = await anext(stream)  # refuse before the stream begins
        return StreamingResponse(
            _chained(first, stream), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    return router


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for part in rest:
            yield part
    finally:
        await rest.aclose()  # type: ignore[attr-defined] # it is a generator


def _owner(request: Request) -> str:
    return str(request.state.owner)


def _json(video: VideoObject) -> Response:
    return Response(to_json(video.model_dump()), media_type="application/json")


class _Jobs:
    """Operations on jobs that several endpoints share."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def mine(self, request: Request, name: str) -> Job:
        """The caller's job. Raises Refusal, also if the job belongs to another caller."""
        job = self._parts.store.get(name, _owner(request)) if IDS.fullmatch(name) else None
        if job is None:
            raise Refusal(404, "video_not_found", "there is no such video", "video_id")
        return job

    def shown(self, job: Job) -> VideoObject:
        """The job as the API answers it."""
        return video_object(job, self._parts.live.progress(job.id), self._parts.store.files(job.id))

    def cancel(self, job: Job) -> None:
        """Cancel a job that has not ended."""
        if self._parts.store.cancel(job.id, self._parts.settings.age):
            if job.status == "queued":
                self._parts.metrics.ended.labels("cancelled").inc()
            self._parts.worker.cancel(job.id)

    async def accept(self, request: Request, key: str | None) -> Job:
        """Make a new job from the request's body."""
        fields = await read_fields(request)
        return await run_in_threadpool(self._accept, _owner(request), fields, _checked(key))

    def _accept(self, owner: str, fields: Fields, key: str | None) -> Job:
        model = self._model(fields.values.get("model"))
        checked = check(model.manifest, fields, self._parts.settings.limits, self._parts.results)
        return self._create(Draft(owner, model.name, checked.arguments, checked.asked, checked.uploads, key))

    def _create(self, draft: Draft) -> Job:
        quota = self._parts.settings.quota
        if sum(len(upload.data) for upload in draft.uploads.values()) > quota:
            raise Refusal(507, "storage_full", f"the files take more than the server's quota of {quota} bytes")
        job, new = self._parts.store.create(draft, self._parts.settings.limits.queue)
        if new:
            self._parts.worker.wake()
        return job

    def _model(self, name: Any) -> Served:
        models = self._parts.catalog.models
        if name is None:
            return self._parts.catalog.default
        if not isinstance(name, str) or name not in models:
            raise Refusal(422, "model_not_found", f"model: unknown; models are {', '.join(models)}", "model")
        return models[name]

    async def remix(self, request: Request, name: str, key: str | None) -> Job:
        """Make a new job from an older one, with another prompt."""
        job = await run_in_threadpool(self.mine, request, name)
        fields = await read_fields(request)
        if unknown := sorted({*fields.values, *fields.files} - {"prompt"}):
            raise Refusal(422, "unknown_field", f"{unknown[0]!a}: unknown; a remix takes prompt", unknown[0][:64])
        return await run_in_threadpool(self._remix, job, fields, _checked(key))

    def _remix(self, job: Job, fields: Fields, key: str | None) -> Job:
        if job.expired:
            raise Refusal(410, "video_expired", "the video has expired")
        model = self._model(job.model)
        names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "frames": "num_frames"}
        kept = {names.get(name, name): value for name, value in job.request.items() if name not in ("width", "height")}
        kept["size"] = f"{job.request['width']}x{job.request['height']}"
        files = {f"controls.{name}": upload for name, upload in self._parts.store.uploads(job.id).items()}
        asked = Fields({**kept, "prompt": fields.values.get("prompt")}, files)
        checked = check(model.manifest, asked, self._parts.settings.limits, self._parts.results)
        draft = Draft(job.owner, model.name, checked.arguments, checked.asked, checked.uploads, key)
        return self._create(replace(draft, remixed=job.id))

    async def file(self, job: Job, wanted: str) -> Response:
        """The answer with a finished job's file. Raises Refusal."""
        if job.expired:
            raise Refusal(410, "video_expired", "the video has expired: its files are removed")
        if job.status != "completed":
            raise Refusal(409, "video_not_ready", f"the video is {job.status}: there is no file", "video_id")

        def make() -> tuple[Any, str]:
            grow = lambda size: self._parts.store.grow(job.id, size)  # noqa: E731
            return self._parts.results.file(job.id, wanted, float(job.request["fps"]), job.metadata or {}, grow)

        try:
            path, media = await run_in_threadpool(make)
        except FileNotFoundError:
            raise Refusal(410, "video_expired", "the video's files are removed") from None
        return FileResponse(path, media_type=media, filename=f"{job.id}{path.suffix}", headers={"x-video-id": job.id})

    async def finished(self, job: Job, is_gone: Callable[[], Awaitable[bool]]) -> Job:
        """Wait until the job has ended and return it. It is cancelled if the client disconnects."""
        with self._parts.live.listen(job.id, previews=False) as listener:
            while (now := await self._now(job)).status not in DONE:
                if self._parts.live.is_closed:
                    raise Refusal(
                        503, "stopping", f"the server is stopping; {job.id} is made after its next start", retry=30
                    )
                if await is_gone():
                    await run_in_threadpool(self.cancel, now)
                await listener.wait(1.0)
            return now

    async def _now(self, job: Job) -> Job:
        found = await run_in_threadpool(self._parts.store.get, job.id)
        if found is None:
            raise Refusal(404, "video_not_found", "the video was deleted meanwhile", "video_id")
        return found

    async def events(self, job: Job, seen: int, previews: bool) -> AsyncIterator[bytes]:
        """The blocks of a job's event stream. The first block comes at once."""
        with self._parts.live.slot(), self._parts.live.listen(job.id, seen, previews) as listener:
            yield _block("status", {"id": job.id, "status": self.shown(job).status})
            while True:
                events = await listener.wait(HEARTBEAT)
                for event in events:
                    if previews or event.name != "preview":
                        yield event.encoded()
                if not events or self._parts.live.has_ended(job.id):
                    now = await run_in_threadpool(self._parts.store.get, job.id)
                    if now is None:
                        yield _block("done", {"id": job.id, "status": "deleted"})
                        return
                    if now.status in DONE:
                        yield _block("done", self.shown(now).model_dump())
                        return
                    if self._parts.live.is_closed:
                        return
                    yield b": still here\n\n"


def _block(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: ".encode() + to_json(dict(data)) + b"\n\n"


def _checked(key: str | None) -> str | None:
    if key is not None and not _KEY.fullmatch(key):
        raise Refusal(422, "invalid_value", "Idempotency-Key: 1 to 255 visible ASCII letters", "Idempotency-Key")
    return key
