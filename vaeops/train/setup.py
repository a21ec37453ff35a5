"""The model, the data and the schedules that a `Config` names, made to fit each other."""

import dataclasses
import inspect
import math
from typing import Any

from torch import nn

from .. import models
from .._names import unknown
from ..models.presets import PRESETS
from ..nn import KLSchedule, VGGTrunk
from . import data, machine
from .config import Config
from .data.codes import check_codes
from .machine import Place


def fitted(config: Config, place: Place, model: Any,
            dataset: data.Dataset | None) -> tuple[Config, Any, data.Dataset]:  # fmt: skip
    """Model and data set, made to fit: what `config.model` leaves open follows from the data's shape."""
    given = model is not None
    if given and config.vgg is not None:
        raise ValueError("vgg: a model that is handed in brings its own trunk")
    machine.seed_all(config.seed)
    model = model if model is not None else _model(config)
    if dataset is None:
        dataset = _load(config, place, model)
    if not len(dataset.x):
        raise ValueError(f"data: {dataset.name} has no samples")
    shape = tuple(dataset.x.shape[1:])
    codes, source = dataset.extra.get("codes"), dataset.extra.get("source")
    fits = _takes(model, shape) and codes in (None, getattr(model, "codes", None))
    fits = fits and (source is None or getattr(model, "source", source) is not None)
    if not given and not fits:
        sizes = {"in_dim": math.prod(shape), "items": math.prod(shape), "channels": shape[0],
                 "size": shape[-1], "side": shape[-1]}  # fmt: skip
        if codes is not None:
            sizes = {"codes": codes, "length": math.prod(shape)}
            sizes |= {} if source is None else {"source": source}
        has = inspect.signature(type(model)).parameters
        sizes = {name: size for name, size in sizes.items() if name in has and name not in config.model}
        config = dataclasses.replace(config, model={**config.model, **sizes})
        model = _model(config)
    if not _takes(model, shape):
        raise ValueError(f"data: {config.preset} takes samples of {tuple(model.input_shape)}, "
                         f"those of {dataset.name} are {shape}")  # fmt: skip
    if not given and dataset.peak and model.input_range is None:
        raise ValueError(f"data: {config.preset} takes values without bounds as they are, those of "
                         f"{dataset.name} are integers of 0 to {dataset.peak}")  # fmt: skip
    if codes is not None:
        check_codes(model, codes, source, "the data set")
    if config.grid_every and len(shape) != 3:
        raise ValueError(f"grid_every must be 0, {dataset.name} has no images; got {config.grid_every}")
    if model.classes:
        if dataset.labels is None:
            raise ValueError(f"data: {config.preset} needs labels, {dataset.name} has none")
        largest = int(dataset.labels.max())
        if largest >= model.classes:
            raise ValueError(f"data: {config.preset} takes labels below {model.classes}, "
                             f"{dataset.name} has {largest}")  # fmt: skip
    return config, model, dataset


def _model(config: Config) -> Any:
    """The preset's model, with weights that follow from the seed."""
    arguments = dict(config.model)
    if config.vgg is not None:
        if "trunk" not in inspect.signature(PRESETS[config.preset]).parameters:
            raise ValueError(f"vgg: {config.preset} has no perceptual loss that would use it")
        arguments["trunk"] = VGGTrunk.from_file(config.vgg, "vgg16", input_range=(-1.0, 1.0))
    machine.seed_all(config.seed)
    ops = "fused" if config.ops.startswith("fused") else "ref"
    try:
        return models.create(config.preset, ops=ops, **arguments)
    except (TypeError, RuntimeError) as error:  # of a type or size that the constructor does not take
        raise ValueError(f"model: {config.preset}: {error}") from error


def _takes(model: Any, shape: tuple[int, ...]) -> bool:
    wanted = tuple(model.input_shape)
    return shape == wanted or (len(wanted) == 1 and math.prod(shape) == wanted[0])


def _load(config: Config, place: Place, model: Any) -> data.Dataset:
    size = data.side(config.data, model.input_shape, config.size)

    def read() -> data.Dataset:
        return data.load(config.data, config.root, split=config.split, size=size, seed=config.split_seed,
                         cache=config.cache)  # fmt: skip

    if place.rank:
        place.any(False)  # the first process fills the cache of decoded images
    dataset = read()
    if not place.rank:
        place.any(False)
    return dataset


def weights(config: Config, model: Any) -> dict[str, float]:
    for name in config.weights:
        if name not in model.weights:
            raise ValueError(unknown("loss term", f"weights.{name}", [f"weights.{n}" for n in model.weights]))
    return {**model.weights, **config.weights}


def schedules(config: Config, model: Any) -> tuple[dict[str, float], nn.ModuleDict]:
    """The KL's weight and its capacity, "beta" and "capacity": those that hold, and those that move."""
    if "kl" not in model.weights:
        for name in ("beta", "beta_steps", "free_bits", "capacity"):
            if getattr(config, name):
                losses = ", ".join(model.weights)
                raise ValueError(f"{name}: {config.preset} has no KL, its losses are {losses}")
    beta = model.weights.get("kl", 0.0) if config.beta is None else config.beta
    moves = nn.ModuleDict()
    if config.beta_steps:
        moves["beta"] = KLSchedule(config.beta_schedule, stop=beta, steps=config.beta_steps)
    if config.capacity_steps:
        moves["capacity"] = KLSchedule("linear", stop=config.capacity, steps=config.capacity_steps)
    return {"beta": beta, "capacity": config.capacity}, moves
