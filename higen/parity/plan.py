"""Lists the cases of a fixture directory: finds every file and reads every header before the first case runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from higen.errors import FixtureError
from higen.families.higen.spec import UNetConfig
from higen.parity import diffusion, network
from higen.parity.companions import plan_companions
from higen.parity.compare import Difference
from higen.parity.fixtures import (
    CaseTensors,
    assemble,
    entry,
    mapping,
    read_json,
    recipe_salt,
    recipe_state,
    recorded_config,
    stored_state,
)
from higen.parity.network import Network

__all__ = ["Planned", "plan"]

Runner = Callable[[Network, dict[str, Any], dict[str, Tensor], str], list[Difference]]

KINDS: dict[str, Runner] = {
    "forward": network.forward,
    "units": network.unit,
    "sample": diffusion.sample,
    "train": diffusion.train,
}
"""Kinds of cases of a model in fixtures.json; their tensors are in `<model>.<kind>.safetensors`."""


@dataclass(frozen=True)
class Planned:
    """A check. `is_case` is false for a check of weights that cases depend on."""

    name: str
    differences: Callable[[], list[Difference]]
    is_case: bool = True


def plan(root: Path) -> list[Planned]:
    """Every case in `root` and below, in the order of the folders. Raises FixtureError."""
    if not root.is_dir():
        raise FixtureError(f"{root}: not a directory")
    found: list[Planned] = []
    for path in sorted(root.rglob("*.json")):
        folder = path.parent.relative_to(root).as_posix()
        prefix = "" if folder == "." else f"{folder}/"
        if path.name == "fixtures.json":
            found += _small_models(path, prefix)
        elif path.name == "companions.json":
            found += (Planned(prefix + name, check) for name, check in plan_companions(path))
        elif re.fullmatch(r"salt\w+\.json", path.name):
            found += _full_size(path, prefix)
    return found


def _small_models(path: Path, prefix: str) -> Iterator[Planned]:
    record, folder = read_json(path), path.parent
    models = mapping(record, "models", str(path))
    _refuse_unknown_kinds(record, models, path)
    loaders = {name: _loader(folder, name, model, str(path)) for name, model in models.items()}
    for name, model in models.items():
        where = f"{prefix}weights/{name}"
        yield Planned(where, partial(_weights, loaders[name], model, where), is_case=False)
    for kind in KINDS:
        for name, load in loaders.items():
            yield from _cases(path, mapping(record, kind, str(path)), kind, name, load, prefix)
    if "misc" in record or (folder / "misc.safetensors").exists():
        where = f"{prefix}misc"
        tables = CaseTensors(folder / "misc.safetensors").read_all()
        for name, difference in diffusion.misc(entry(record, "misc", dict, str(path)), tables, where):
            yield Planned(f"{where}/{name}", partial(list, [difference]))


def _cases(
    path: Path, records: dict[str, dict[str, Any]], kind: str, model: str, load: Callable[[], Network], prefix: str
) -> Iterator[Planned]:
    """The cases of one kind and one model. The JSON file and the tensor file must list the same cases."""
    listed = {name.partition("/")[2]: record for name, record in records.items() if name.startswith(f"{model}/")}
    file = path.with_name(f"{model}.{kind}.safetensors")
    if not listed and not file.exists():
        return
    tensors = _tensors_of(file, listed, path)
    for name, record in listed.items():
        where = f"{prefix}{kind}/{model}/{name}"
        yield Planned(where, partial(_of_model, KINDS[kind], load, record, tensors, name, where))


def _tensors_of(file: Path, listed: dict[str, Any], path: Path) -> CaseTensors:
    tensors = CaseTensors(file)
    if differing := sorted(tensors.cases ^ set(listed)):
        raise FixtureError(f"{file}: its cases differ from those that {path.name} lists: {', '.join(differing[:10])}")
    return tensors


def _refuse_unknown_kinds(record: dict[str, Any], models: dict[str, dict[str, Any]], path: Path) -> None:
    """Raise FixtureError for an unknown kind of case, model or tensor file, because nothing would check it."""
    for kind, cases in record.items():
        of_models = isinstance(cases, dict) and any(name.partition("/")[0] in models for name in cases if "/" in name)
        if of_models and kind not in KINDS:
            raise FixtureError(f"{path}: unknown kind of case {kind}; known are {', '.join(KINDS)}, misc")
        if kind in KINDS:
            for name in mapping(record, kind, str(path)):
                if name.partition("/")[0] not in models:
                    raise FixtureError(f"{path}: {kind}: {name}: of a model that is not listed")
    for file in sorted(path.parent.glob("*.safetensors")):
        model, _, kind = file.name.removesuffix(".safetensors").rpartition(".")
        if file.name != "misc.safetensors" and not (model in models and kind in (*KINDS, "weights")):
            raise FixtureError(f"{file}: not a file of a model in {path.name} of a known kind")


def _loader(folder: Path, name: str, model: dict[str, Any], where: str) -> Callable[[], Network]:
    """Makes a model once, from stored weights or by the recipe."""
    config = recorded_config(entry(model, "kwargs", dict, f"{where}: {name}"), f"{where}: {name}")
    file = folder / f"{name}.weights.safetensors"
    if model.get("stored", file.exists()):
        CaseTensors(file)  # checks that it exists and is complete
        return cache(lambda: Network(assemble(config, stored_state(file, config).items())))
    return _by_recipe(config, recipe_salt(entry(model, "weight_recipe", str, f"{where}: {name}"), f"{where}: {name}"))


def _by_recipe(config: UNetConfig, salt: int) -> Callable[[], Network]:
    return cache(lambda: Network(assemble(config, recipe_state(config, salt))))


def _of_model(
    runner: Runner, load: Callable[[], Network], record: dict[str, Any], tensors: CaseTensors, case: str, where: str
) -> list[Difference]:
    return runner(load(), record, tensors.read(case), where)


def _weights(load: Callable[[], Network], record: dict[str, Any], where: str) -> list[Difference]:
    return network.weights(load(), record, where)


def _full_size(path: Path, prefix: str) -> Iterator[Planned]:
    """`salt<N>.json`: forward cases of the released architecture, tensors in `salt<N>.f32.safetensors`."""
    record, name = read_json(path), path.stem
    made = entry(record, "weights", dict, str(path))
    config = recorded_config(made["kwargs"], str(path)) if "kwargs" in made else UNetConfig()
    load = _by_recipe(config, recipe_salt(entry(made, "recipe", str, str(path)), str(path)))
    cases = {key: value for key, value in record.items() if key != "weights"}
    tensors = _tensors_of(path.with_name(f"{name}.f32.safetensors"), cases, path)
    where = f"{prefix}weights/{name}"
    yield Planned(where, partial(_weights, load, made, where), is_case=False)
    for case in cases:
        where = f"{prefix}forward/{name}/{case}"
        yield Planned(
            where, partial(_of_model, network.forward, load, entry(record, case, dict, str(path)), tensors, case, where)
        )
