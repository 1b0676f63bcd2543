"""The application: endpoints for videos, models, health and metrics. Every request passes the guard first."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from higen.errors import HigenError
from higen.presets import usual_preset
from higen.serve.asks import schema_of
from higen.serve.catalog import Catalog, Served
from higen.serve.guard import Guard
from higen.serve.keys import read_keys
from higen.serve.live import Live
from higen.serve.metrics import Metrics
from higen.serve.refusals import Refusal, as_refusal
from higen.serve.results import Results
from higen.serve.routes import Parts, video_routes
from higen.serve.schema import REFUSALS, ModelObject, Models
from higen.serve.settings import Limits, Settings
from higen.serve.store import Store
from higen.serve.webpage import page_routes
from higen.serve.worker import Worker
from higen.version import __version__

__all__ = ["Service", "open_service"]

_CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclass(frozen=True)
class Service:
    """The application, and the parts to close when it ends."""

    app: ASGIApp
    parts: Parts

    def close(self) -> None:
        """Stop the jobs, free the models and close the queue. Stopped jobs run again after the next start."""
        self.parts.worker.stop()
        self.parts.catalog.close()
        self.parts.store.close()


def open_service(settings: Settings) -> Service:
    """Open the folder, read the models and load those that fit. The caller must hold the folder's lock.

    Raises RequestError, ModelError, BackendError or ServeError. In that case nothing stays open.
    """
    keys = None if settings.keys is None else read_keys(settings.keys)
    catalog = Catalog(settings)
    results = Results(settings.folder)
    store = Store(settings.folder / "jobs.sqlite")
    try:
        store.recover(settings.age)
        results.sweep(store.completed_ids())
        catalog.warm()
    except BaseException:
        catalog.close()
        store.close()
        raise
    live = Live(settings.limits.streams)

    def now() -> dict[str, float]:
        loaded = list(catalog.loaded().values())
        return {
            "jobs_running": worker.running,
            "streams": live.listeners,
            "models_loaded": len(loaded),
            "results_bytes": store.used(),
            "batches_total": sum(running.shared.batches for running in loaded),
            "batch_rows_total": sum(running.shared.rows for running in loaded),
        }

    metrics = Metrics(now, store.counts)
    worker = Worker(settings, store, results, catalog, live, metrics)
    parts = Parts(settings, catalog, store, results, live, worker, metrics)
    return Service(Guard(_application(parts), settings, keys, metrics), parts)


def _application(parts: Parts) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.worker.start()
        yield

    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(parts.settings.origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", "idempotency-key", "last-event-id"],
        expose_headers=["x-video-id", "retry-after"],
    )
    app = FastAPI(
        title="higen",
        version=__version__,
        description="Videos from text. The endpoints below /v1 are OpenAI's, with extensions.",
        lifespan=lifespan,
        responses=REFUSALS,
        middleware=[cors] if parts.settings.origins else [],
        redirect_slashes=False,
    )
    for kind in (HigenError, sqlite3.Error, OSError, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.include_router(video_routes(parts))
    app.include_router(page_routes())
    _add_models(app, parts)
    _add_health(app, parts)
    return app


def _answer(refusal: Refusal) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers())


def _refused(_: Request, error: Exception) -> Response:
    return _answer(as_refusal(error))


def _gone(_: Request, error: Exception) -> Response:
    return _answer(Refusal(400, "client_gone", "the body ended too early"))


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])[:64]
    return _answer(Refusal(422, "invalid_value", f"{name}: {first['msg']}", name))


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    return _answer(Refusal(status, _CODES.get(status, "refused"), str(error.detail)))


def _add_models(app: FastAPI, parts: Parts) -> None:
    catalog, limits = parts.catalog, parts.settings.limits

    @app.get("/v1/models", response_model=Models, tags=["models"])
    def list_models() -> Models:
        """The models, the default one first."""
        return Models(data=[_model(model, limits) for model in catalog.models.values()])

    @app.get("/v1/models/{model}", response_model=ModelObject, tags=["models"])
    def retrieve_model(model: str) -> ModelObject:
        """A model: its sizes, loops, and the JSON schema of its controls."""
        if model not in catalog.models:
            raise Refusal(404, "model_not_found", f"no such model; models are {', '.join(catalog.models)}", "model")
        return _model(catalog.models[model], limits)


def _model(model: Served, limits: Limits) -> ModelObject:
    manifest, sizes = model.manifest, model.manifest.sizes
    loops: list[dict[str, Any]] = [
        {
            "name": loop.name,
            "num_inference_steps": loop.steps,
            "guidance_scale": loop.guidance,
            "solvers": [solver.name for solver in loop.solvers],
        }
        for loop in manifest.loops
    ]
    fewest, default, most = sizes.frames
    return ModelObject(
        id=model.name,
        created=model.created,
        licence=manifest.licence,
        controls=schema_of(manifest),
        prompts=list(manifest.prompts),
        words=None if model.words is None else list(model.words),
        sizes={
            "width": sizes.width,
            "height": sizes.height,
            "multiple": sizes.multiple,
            "fps": sizes.fps,
            "num_frames": {"minimum": fewest, "default": default, "maximum": min(most, limits.frames)},
        },
        loops=loops,
        presets=[preset.name for preset in manifest.presets],
        usual_preset=usual_preset(manifest.presets),
    )


def _add_health(app: FastAPI, parts: Parts) -> None:
    @app.get("/health", tags=["server"])
    def health() -> dict[str, str]:
        """Answer, to show that the process runs."""
        return {"status": "ok", "version": __version__}

    @app.get("/ready", tags=["server"])
    def ready() -> dict[str, str]:
        """Answer 200 if jobs are accepted and run, else 503."""
        if not parts.worker.is_alive:
            raise Refusal(503, "not_ready", "jobs are not started now", retry=5)
        parts.store.counts()
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
