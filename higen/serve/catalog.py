"""The models of a server. Their manifests are always in memory; their weights are loaded when they are used.

The size of a model is the size of its weights files. If the next model does not fit into the memory limit, loaded
models without users are freed, the least recently used first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from higen.api import load
from higen.axes import most_rows
from higen.backends.batching import Batcher
from higen.backends.shared_batches import SharedBackend
from higen.bundle import Bundle, default_model
from higen.errors import RequestError, quoted
from higen.manifest import Manifest
from higen.paths import given_path
from higen.pipeline import Pipeline
from higen.serve.settings import Settings
from higen.tokenizer import PromptTokenizer

__all__ = ["Catalog", "Running", "Served"]


@dataclass(frozen=True)
class Served:
    """A model that requests may use by its name."""

    name: str
    bundle: Bundle
    created: int
    size: int
    words: tuple[str, ...] | None
    """The words that the model knows; None if it takes any word."""

    @property
    def manifest(self) -> Manifest:
        """The model's manifest."""
        return self.bundle.manifest


@dataclass(frozen=True, eq=False)
class Running:
    """A loaded model and the backend that batches its requests."""

    pipeline: Pipeline
    shared: SharedBackend

    def close(self) -> None:
        """Free the model."""
        self.shared.close()
        self.pipeline.close()


@dataclass(eq=False)
class _Place:
    """A model's reserved memory. It is reserved before the model is loaded."""

    users: int = 0
    used: float = 0.0
    running: Running | None = None
    loading: threading.Lock = field(default_factory=threading.Lock)


class Catalog:
    """The models by name, the default one first."""

    def __init__(self, settings: Settings) -> None:
        """Reads every model's manifest. Raises ModelError; RequestError for a repeated name or too large a model."""
        self._settings = settings
        self.models: Mapping[str, Served] = _served(settings.models)
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        for model in self.models.values():
            if settings.memory is not None and model.size > settings.memory:
                raise RequestError(f"memory={settings.memory}: {model.name} alone has {model.size} bytes of weights")

    @property
    def default(self) -> Served:
        """The model for requests that name no model."""
        return next(iter(self.models.values()))

    def warm(self) -> None:
        """Load models in their order as long as they fit, so that a broken one is found before the server starts."""
        for name, model in self.models.items():
            if self._settings.memory is not None and self._loaded() + model.size > self._settings.memory:
                break
            self.admit(name)
            with self.use(name):
                pass

    def admit(self, name: str) -> bool:
        """Reserve memory for one more user of a model. Returns False if the model does not fit now.

        After True, the caller must call `use` or `leave`, which give the reservation back.
        """
        freed: list[Running] = []
        with self._lock:
            place = self._places.get(name)
            if place is None:
                victims = self._victims(self.models[name].size)
                if victims is None:
                    return False
                freed = [running for victim in victims if (running := self._places.pop(victim).running) is not None]
                place = self._places[name] = _Place()
            place.users += 1
        for running in freed:
            running.close()
        return True

    @contextmanager
    def use(self, name: str) -> Iterator[Running]:
        """A model after `admit`, loaded if necessary. Raises what `higen.load` raises."""
        with self._lock:
            place = self._places[name]
        try:
            with place.loading:
                if place.running is None:
                    place.running = self._load(self.models[name])
            yield place.running
        finally:
            self.leave(name)

    def leave(self, name: str) -> None:
        """Give back one user's reservation. The model stays loaded until its memory is needed."""
        with self._lock:
            place = self._places[name]
            place.users -= 1
            place.used = time.monotonic()
            if not place.users and place.running is None:  # the model could not be loaded
                del self._places[name]

    def close(self) -> None:
        """Free all models."""
        with self._lock:
            places, self._places = list(self._places.values()), {}
        for place in places:
            if place.running is not None:
                place.running.close()

    def loaded(self) -> dict[str, Running]:
        """The models that are loaded now."""
        with self._lock:
            return {name: place.running for name, place in self._places.items() if place.running is not None}

    def _loaded(self) -> int:
        with self._lock:
            return sum(self.models[name].size for name in self._places)

    def _victims(self, size: int) -> list[str] | None:
        """The models to free for a model of this size; None if it does not fit even then."""
        if self._settings.memory is None:
            return []
        total = sum(self.models[name].size for name in self._places) + size
        idle = sorted((n for n, p in self._places.items() if not p.users), key=lambda n: self._places[n].used)
        victims = []
        while total > self._settings.memory:
            if not idle:
                return None
            victims.append(idle.pop(0))
            total -= self.models[victims[-1]].size
        return victims

    def _load(self, model: Served) -> Running:
        told = self._settings
        pipeline = load(
            model.bundle.path, told.backend, device=told.device, precision=told.precision, threads=told.threads
        )
        rows = {s.name: most_rows(model.manifest, s, told.max_batch) for s in model.manifest.all_stages if s.batch}
        batcher = Batcher(told.slots, rows)
        return Running(pipeline, SharedBackend(pipeline.backend, model.manifest, batcher))


def _served(given: Sequence[str]) -> dict[str, Served]:
    found: dict[str, Served] = {}
    for entry in given or (str(default_model()),):
        name, equals, rest = entry.partition("=")
        named = bool(equals) and not given_path(entry).exists()
        path = given_path(rest if named else entry, "model")
        bundle = Bundle.open(path)
        shown = name if named else ("higen" if path == default_model() else Path(path).resolve().name)
        if shown in found or not shown.isprintable() or not 1 <= len(shown) <= 64:
            raise RequestError(
                f"model={quoted(entry)}: the name {quoted(shown)} is taken or not allowed; write NAME=DIRECTORY"
            )
        size = sum(bundle.files[file].size for file in bundle.manifest.weights if file in bundle.files)
        found[shown] = Served(shown, bundle, int(Path(bundle.path).stat().st_mtime), size, _words(bundle))
    return found


def _words(bundle: Bundle) -> tuple[str, ...] | None:
    text = bundle.manifest.text
    words = None if text is None else PromptTokenizer.from_file(bundle.file(text.tokenizer), text).words()
    return None if words is None else tuple(words)
