"""The settings of a training: one flat dataclass, what the presets change in it, `key=value` arguments.

config = parse(["preset=vae-mlp", "data=mnist", "lr=3e-4", "model.latent=10"])
"""

import ast
import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .._names import unknown

BetaSchedule = Literal["constant", "linear", "cyclical", "cosine", "sigmoid"]


@dataclass(frozen=True)
class Config:
    """All that a training follows from. `make` and `parse` begin at the preset's own defaults.

    Raises:
        ValueError: naming the setting, what came and what is taken.
    """

    preset: str  # reference model, of vaeops.models.presets()
    data: str = "digits"  # data set, of vaeops.train.data.names()
    root: str | None = None  # folder of the data sets; None: as vaeops.train.data.load finds it
    cache: str | None = None  # folder of decoded images; None: beside them
    split: str = "train"  # or "train+valid", and what else vaeops.train.data.load takes
    size: int | None = None  # side of the images; None: the model's
    split_seed: int = 0  # of data sets that come without a split
    model: dict[str, Any] = field(default_factory=dict)  # arguments of the model's constructor
    vgg: str | None = None  # file of VGG16's weights: celeba-vae and -xl then have a perceptual loss
    # vaeops' kernels, the same in PyTorch, and each of them under torch.compile ("compile": of "ref")
    ops: Literal["fused", "fused-compile", "ref", "compile"] = "fused"
    seed: int = 0  # of weights, order of the images and noise
    steps: int | None = None  # optimizer steps; or
    epochs: int | None = 20  # passes over the data set
    batch: int = 128  # samples of an optimizer step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches that a process cuts its share of a batch in
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3  # learning rate at its highest
    weight_decay: float = 0.0  # of AdamW
    lr_schedule: Literal["constant", "cosine", "step"] = "constant"  # cosine falls to 0 at the last step
    lr_every: int = 1  # epochs between two drops of "step"
    lr_drop: float = 0.5  # factor of such a drop
    warmup: int = 0  # steps over which the learning rate rises from 0
    clip: float = 0.0  # largest norm of the gradient; 0: any
    ema: float = 0.0  # decay of averaged weights, which pictures are then made with; 0: none
    amp: Literal["none", "bf16", "fp16"] = "none"  # autocast of the model; losses are fp32
    weights: dict[str, float] = field(default_factory=dict)  # of loss terms, where not the model's own
    beta: float | None = None  # weight of the KL at the end of its schedule; None: the model's own
    beta_schedule: BetaSchedule = "constant"  # as in vaeops.nn.KLSchedule
    beta_steps: int = 0  # that the schedule takes
    free_bits: float = 0.0  # nats under the KL of each latent dim; 0: none
    capacity: float = 0.0  # C nats in |KL - C|, the KL's term then; 0: the plain KL
    capacity_steps: int = 0  # over which C rises from 0
    log_every: int = 50  # steps between two lines of the log
    grid_every: int = 500  # steps between two pictures; 0: none
    checkpoint_every: int = 1000  # steps between two checkpoints; 0: only one at the end
    keep: int = 3  # newest checkpoints that stay
    tensorboard: bool = False  # the log for TensorBoard, too
    out: str | None = None  # folder of the run; None: runs/PRESET
    device: str | None = None  # None: CUDA where there is a GPU, else the CPU
    deterministic: bool = False  # refuse operations that are not, at some cost on a GPU

    def __post_init__(self) -> None:
        for name, hint in HINTS.items():
            value = getattr(self, name)
            if isinstance(value, os.PathLike):  # as checkpoints and JSON keep it
                object.__setattr__(self, name, value := os.fspath(value))
            if value == "":
                raise ValueError(f"{name} must not be empty")
            if get_origin(hint) is Literal:
                if value not in get_args(hint):
                    raise ValueError(f"{name} must be one of {get_args(hint)}, got {value!r}")
            elif not _is(value, hint):
                kind = hint if get_origin(hint) else hint.__name__
                raise ValueError(f"{name} must be {kind}, got {value!r}")
            least = _LEAST.get(name, -math.inf)
            if isinstance(value, (int, float)) and not least <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least {least}, got {value}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give one of steps and epochs, got {self.steps} and {self.epochs}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay is of optimizer='adamw', got it with {self.optimizer!r}")
        if self.lr_schedule != "step":
            for name in ("lr_every", "lr_drop"):
                if (value := getattr(self, name)) != getattr(Config, name):
                    raise ValueError(
                        f"{name} is of lr_schedule='step', got {value} with {self.lr_schedule!r}"
                    )
        if (self.beta_schedule == "constant") != (self.beta_steps == 0):
            raise ValueError(f"beta_schedule {self.beta_schedule!r} does not go with beta_steps "
                             f"{self.beta_steps}: all but 'constant' need steps")  # fmt: skip
        if self.free_bits and self.capacity:
            raise ValueError("give one of free_bits and capacity")
        if self.free_bits and self.accumulate > 1:
            raise ValueError("free_bits is a floor under the KL of the whole batch: accumulate must be 1")
        if self.capacity and self.accumulate > 1:
            raise ValueError("capacity is of the KL of the whole batch: accumulate must be 1")
        if self.capacity_steps and not self.capacity:
            raise ValueError("capacity_steps is without capacity")
        if "kl" in self.weights:
            raise ValueError("weights.kl: the KL's weight is beta")
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights.{name} must be finite and at least 0, got {weight}")
        for name in ("seed", "split_seed"):
            if (value := getattr(self, name)) >= 2**63:
                raise ValueError(f"{name} must be below 2^63, got {value}")


HINTS: dict[str, Any] = get_type_hints(Config)
_LEAST = {
    "size": 1, "steps": 1, "epochs": 1, "batch": 1, "accumulate": 1, "lr": 0, "weight_decay": 0,
    "lr_every": 1, "lr_drop": 0, "warmup": 0, "clip": 0, "beta": 0, "beta_steps": 0, "free_bits": 0,
    "capacity": 0, "capacity_steps": 0, "log_every": 1, "grid_every": 0, "checkpoint_every": 0, "keep": 1,
    "seed": 0, "split_seed": 0,
}  # fmt: skip

# What the presets change, as in the works that they follow. Those of the lessons know no validation split.
_LESSON = {"data": "mnist", "split": "train+valid"}
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "tiny-2d": {"data": "points", "epochs": 200, "batch": 256, "lr": 0.02, "grid_every": 0},
    "ae-mlp": _LESSON,
    "ae-conv": _LESSON,
    "ae-denoise": _LESSON,
    "ae-sparse": _LESSON,
    "vae-mlp": {**_LESSON, "epochs": 30},
    "vae-mlp-10": _LESSON,
    "vae-conv": {**_LESSON, "epochs": 30},
    "vae-conv-small": {**_LESSON, "epochs": 5},
    "vae-mlp-50": {**_LESSON, "epochs": 10, "batch": 64, "optimizer": "adamw", "weight_decay": 0.01},
    "cvae": _LESSON,
    "workshop-ae": {**_LESSON, "steps": 500, "grid_every": 100},
    "workshop-vae": {**_LESSON, "steps": 500, "grid_every": 100},
    "workshop-vq": {**_LESSON, "steps": 15_000},
    "celeba-vae": {"data": "celeba", "epochs": 12, "batch": 64, "lr_schedule": "step"},
    "celeba-vae-xl": {"data": "celeba", "epochs": 50, "batch": 64, "optimizer": "adamw", "lr": 2e-4,
                      "lr_schedule": "cosine", "warmup": 500, "clip": 1.0, "ema": 0.999},
    "vq-vae": {"data": "celeba", "steps": 15_000, "batch": 256},
    "vq-vae-2": {"data": "celeba", "steps": 15_000, "lr": 3e-4},
    "code-prior": {"data": "codes", "epochs": 50, "optimizer": "adamw", "weight_decay": 0.01, "warmup": 200,
                   "clip": 1.0, "grid_every": 0},
    "mult-vae": {"data": "movielens", "epochs": 200, "beta": 0.2, "beta_schedule": "linear",
                 "beta_steps": 1000, "grid_every": 0},
    "ddpm-tiny": {"data": "mnist", "epochs": 30, "lr": 2e-4, "ema": 0.999, "clip": 1.0},
}  # fmt: skip

# A run may be resumed with another value of these: what is learned does not follow from them. Of `vgg`, with
# another file of the same weights, and not with a file in place of none.
MAY_CHANGE = ("root", "cache", "vgg", "steps", "epochs", "log_every", "grid_every", "checkpoint_every",
              "keep", "tensorboard", "out", "device")  # fmt: skip


def make(preset: str, **changes: Any) -> Config:
    """The preset's settings, with changes. Of steps and epochs the one that is given replaces the other."""
    return changed(changed(Config(preset), TRAIN_PRESETS.get(preset, {})), changes)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """config with other values; unknown names raise ValueError with the nearest ones."""
    for name in changes:
        if name not in HINTS:
            raise ValueError(unknown("setting", name, HINTS))
    other = {"steps": "epochs", "epochs": "steps"}
    given = [name for name in other if changes.get(name) is not None]
    if len(given) == 1:
        changes = {other[given[0]]: None, **changes}
    return dataclasses.replace(config, **changes)


def parse(arguments: Iterable[str], base: Config | None = None) -> Config:
    """Settings from `key=value` texts, over those of `base`, or of the preset among the arguments.

    Types are the dataclass's. `model.latent=10` and `weights.recon=0.5` set one entry; a model's value is a
    Python literal, true, false or none in any case, or a text.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"settings are key=value, got {argument!r}")
        if name in texts:
            raise ValueError(f"{name} is given twice, as {texts[name]!r} and {text!r}")
        texts[name] = text
    if base is None:
        if "preset" not in texts:
            raise ValueError("preset is missing")
        base = make(texts["preset"])
    values: dict[str, Any] = {}
    for path, text in texts.items():
        name, dot, entry = path.partition(".")
        if name not in HINTS:
            raise ValueError(unknown("setting", name, HINTS))
        hint = HINTS[name]
        if (get_origin(hint) is dict) != bool(dot):
            raise ValueError(f"{name} has no entries" if dot else f"{name} is set by {name}.ENTRY=VALUE")
        if dot:
            entries = values.setdefault(name, dict(getattr(base, name)))
            entries[entry] = _convert(path, text, get_args(hint)[1])
        else:
            values[name] = _convert(name, text, hint)
    return changed(base, values)


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """What a resumed run may not change and did, one text each. old: a checkpoint's settings."""
    plain, came = _plain(old), _plain(dataclasses.asdict(new))
    kept = {name for name in {**plain, **came} if name not in MAY_CHANGE}
    if None in (plain.get("vgg"), came.get("vgg")):
        kept.add("vgg")
    return [f"{name}: {plain.get(name)!r} became {came.get(name)!r}" for name in {**plain, **came}
            if name in kept and plain.get(name) != came.get(name)]  # fmt: skip


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a setting's type. Integers are floats, bools are no numbers."""
    if get_origin(hint) is UnionType:
        return any(_is(value, kind) for kind in get_args(hint))
    if get_origin(hint) is dict:
        of = get_args(hint)[1]
        return isinstance(value, dict) and all(isinstance(k, str) and _is(v, of) for k, v in value.items())
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


_WORDS = {"true": True, "false": False, "none": None}


def _convert(name: str, text: str, hint: Any) -> Any:
    if hint is Any:
        if text.lower() in _WORDS:  # a text "false" would be true
            return _WORDS[text.lower()]
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    if get_origin(hint) is UnionType:
        if text.lower() == "none":
            return None
        hint = get_args(hint)[0]
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    elif hint is not bool:
        return text
    raise ValueError(f"{name} must be {hint.__name__}, got {text!r}")


def _plain(value: Any) -> Any:
    """As JSON has it, where tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
