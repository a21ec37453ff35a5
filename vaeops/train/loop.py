"""The training loop of every reference model.

    result = train(make("vae-mlp", data="mnist"))

One step: a batch of bytes goes to the device and is scaled there; `model.terms` gives the losses, whose
weighted sum is minimised; what they were is kept on the device. The host waits for the device only every
`log_every` steps, when it reads them, and for pictures and checkpoints.

Under torchrun each process takes its part of a batch. Noise belongs to a sample's place in the batch, so
processes and micro-batches change results by rounding alone; except that batch norm sees what one of them
sees, and that k-means starts a codebook from the first micro-batch.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from .. import _info, models, objectives, rng
from .._files import atomic
from ..nn import VectorQuantize, update_codebooks
from ..ops._library import serving
from . import checkpoint, data, machine, plots, setup
from .config import Config, differences
from .log import FILE, Log, read
from .machine import Place

SHOWN = 16  # images of a grid
RESIDENT = 8 << 30  # bytes: a data set up to this size is kept on the GPU
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class NonFinite(RuntimeError):
    """A loss or a parameter is NaN or infinite; the message names it, its step and the last checkpoint."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training after it saved its state; the message says where. signal: its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@dataclass
class Result:
    """A finished training.

    model: on its device, in eval mode. ema: the model with averaged weights, or None. record: the last line
    of the log. checkpoint: the newest one.
    """

    model: Any
    ema: Any
    record: dict[str, float]
    checkpoint: Path


def train(config: Config, resume: str | Path | None = None, *, model: Any = None,
          dataset: data.Dataset | None = None) -> Result:  # fmt: skip
    """Train a reference model; write log, pictures, checkpoints and `config.json` to `config.out`.

    Args:
        config: of `vaeops.train.config.make` or `parse`.
        resume: a checkpoint, or the folder of a run, to go on from: on a CPU to the same bits as without
            the stop. What `config` may then change is `vaeops.train.config.MAY_CHANGE`.
        model: in place of `config.preset`: any module with the reference models' `terms`, `weights`,
            `input_shape`, `input_range` and `classes`.
        dataset: in place of `config.data`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: what does not fit, by its name.
        NonFinite: a loss is NaN or infinite. The last checkpoint is of before.
        Interrupted: Ctrl-C or SIGTERM came, and the state was saved.
        OSError: something could not be written. The last checkpoint stays.
    """
    state = None if resume is None else checkpoint.load(resume)
    if state is not None:  # but for the model's arguments, which the data complete
        _check_same(state["config"], dataclasses.replace(config, model=state["config"]["model"]))
    with machine.processes(config.device) as place, machine.repeatable(config.deterministic):
        trainer = _Trainer(config, place, model, dataset)
        if state is not None:
            if "source" in trainer.config.model:  # which older priors did not keep
                state["config"]["model"].setdefault("source", trainer.config.model["source"])
            _check_same(state["config"], trainer.config)
            trainer.restore(state)
        with machine.stop_requests() as stops:
            return trainer.run(stops, fresh=state is None)


def _check_same(old: dict[str, Any], new: Config) -> None:
    changes = differences(old, new)
    if changes:
        raise ValueError("the checkpoint is of a run with other settings: " + "; ".join(changes))


class _Terms(nn.Module):
    """`model.terms` as a forward: what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, label: Tensor | None, seed: Tensor, row: int) -> tuple[dict, dict]:
        losses, monitors = self.model.terms(x, label, seed=seed, row=row)
        return losses, monitors


class _Trainer:
    def __init__(self, config: Config, place: Place, model: Any,
                 dataset: data.Dataset | None) -> None:  # fmt: skip
        self.place, device = place, place.device
        if config.amp == "fp16" and device.type != "cuda":
            raise ValueError(f"amp='fp16' needs a GPU; use 'bf16', got it with device {device}")
        config, self.model, dataset = setup.fitted(config, place, model, dataset)
        self.out = Path(config.out or f"runs/{config.preset}")
        self.config = dataclasses.replace(config, out=str(self.out))
        self.model.to(device).train()
        for module in self.model.modules():
            if isinstance(module, VectorQuantize) and not module.deferred:
                module.accumulate = True  # the codebook moves once a step, by all of a batch
        self.weights = setup.weights(config, self.model)
        self.held, moves = setup.schedules(config, self.model)
        self.schedules: Any = moves.to(device)

        self.batches = data.Batches(
            len(dataset.x), config.batch, config.seed, rank=place.rank, world=place.world
        )
        if self.batches.share % config.accumulate:
            raise ValueError(f"batch {config.batch} over {place.world} processes must be a multiple of "
                             f"accumulate, got {config.accumulate}")  # fmt: skip
        self.steps = config.steps or (config.epochs or 0) * self.batches.steps_per_epoch
        self.step = self.saved = 0
        resident = device.type == "cuda" and dataset.x.nbytes <= RESIDENT
        self.dataset = dataset.resident(device) if resident else dataset

        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # The fused optimizers neither wait for the device nor need to, not even with scaled gradients.
        self.optimizer = OPTIMIZERS[config.optimizer](self.parameters, lr=config.lr, fused=True,
                                                      weight_decay=config.weight_decay)  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        # AveragedModel would ask the device at each step whether it is the first one.
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema else None
        self.average = get_ema_multi_avg_fn(config.ema)
        self.noise = rng.make_seed(generator=torch.Generator().manual_seed(config.seed)).to(device)

        self.forward: Any = _Terms(self.model)
        if config.ops.endswith("compile"):
            self.forward = torch.compile(self.forward)
        if place.world > 1:
            ids = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=ids, gradient_as_bucket_view=True)

        # A row for each step since the last line of the log: means over its micro-batches.
        self.columns: list[str] = []
        self.terms: list[str] = []
        self.window, self.filled = torch.empty(0), 0
        self.clocked, self.since = 0, time.perf_counter()

    def run(self, stops: list[int], fresh: bool) -> Result:
        if self.place.rank == 0:
            self._begin(fresh)
        log = Log(self.out, self.step, self.config.tensorboard) if self.place.rank == 0 else None
        batch, stop = self.config.batch, False
        record: dict[str, float] = {}
        if self.step == self.steps and (self.out / FILE).exists():  # nothing is left to do
            record = next(reversed(read(self.out / FILE)), {})
        self.clocked, self.since = self.step, time.perf_counter()
        with (
            closing(log) if log else nullcontext(),
            tqdm(total=self.steps * batch, initial=self.step * batch, desc=self.config.preset, unit="img",
                 unit_scale=True, mininterval=0.5, disable=self.place.rank > 0) as bar,
        ):  # fmt: skip
            while self.step < self.steps:
                self._step()
                bar.update(batch)
                last = self.step == self.steps
                if logs := last or self.step % self.config.log_every == 0:
                    record = self._record()
                    if log:
                        log.write(record)
                    shown = ("loss", *self.terms)
                    bar.set_postfix({name: f"{record[name]:.4g}" for name in shown}, refresh=False)
                if self.config.grid_every and self.step % self.config.grid_every == 0:
                    with self._apart():
                        self._draw()
                # Processes agree to stop where they wait for one another anyway.
                stop = bool(stops) if self.place.world == 1 else logs and self.place.any(bool(stops))
                every = self.config.checkpoint_every
                if last or stop or (every and self.step % every == 0):
                    with self._apart():
                        self._save()
                if stop and not last:
                    break
        if stop and self.step < self.steps:
            raise Interrupted(f"stopped after step {self.step}; saved {self._path()}; go on with "
                              f"--resume {self.out}", stops[0] if stops else 2)  # fmt: skip
        if self.place.rank == 0 and hasattr(self.model, "preset"):
            models.save(self.ema or self.model, self.out / "model.safetensors")
        return Result(self.model.eval(), self.ema, record, self._path())

    def _step(self) -> None:
        config, parts = self.config, self.config.accumulate
        seed = rng.fold_in(self.noise, self.step)
        x, label = self.dataset.batch(next(self.batches), self.place.device)
        labels = label.chunk(parts) if label is not None and self.model.classes else [None] * parts
        row, seen = self.batches.row, []
        for i, (part, own) in enumerate(zip(x.chunk(parts), labels)):
            # Processes exchange gradients once a step, with the last micro-batch.
            alone = self.place.world > 1 and i < parts - 1
            with self.forward.no_sync() if alone else nullcontext():
                seen.append(self._backward(part, own, seed, row))
            row += len(part)
        kept = torch.stack([torch.stack(list(values.values())) for values in seen]).mean(0)
        columns = list(seen[0])

        lr = config.lr * _lr_factor(config, self.step, self.steps, self.batches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if config.clip:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.parameters, config.clip)
            kept, columns = torch.cat((kept, norm.detach().view(1))), [*columns, "grad_norm"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        update_codebooks(self.model)
        if self.ema is not None:
            self._average()
        for schedule in self.schedules.values():
            schedule.step()
        self.step += 1

        if not self.columns:
            self.columns, self.window = columns, kept.new_empty(config.log_every, len(columns))
        self.window[self.filled] = kept
        self.filled += 1

    def _backward(self, x: Tensor, label: Tensor | None, seed: Tensor, row: int) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch, x as stored; its losses and monitors, detached."""
        x = data.scale(x, self.dataset.peak, self.model.input_range).reshape(-1, *self.model.input_shape)
        device, amp = self.place.device.type, AMP.get(self.config.amp)
        with torch.autocast(device, amp, enabled=amp is not None):
            losses, monitors = self.forward(x, label, seed, row)
        total = self._total(losses)
        self.scaler.scale(total / self.config.accumulate).backward()
        self.terms = list(losses)
        seen = {"loss": total, **{name: loss.sum() for name, loss in losses.items()}, **monitors}
        seen |= {name: self._now(name) for name in self.schedules}
        return {name: value.detach().float() for name, value in seen.items()}

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        """sum of weight * loss, fp32 []."""
        parts = []
        for name, loss in losses.items():
            if name not in self.weights:
                raise ValueError(f"{type(self.model).__name__} has no weight for its loss {name!r}, only for "
                                 f"{', '.join(self.weights)}")  # fmt: skip
            term = self._now("beta") * self._kl(loss) if name == "kl" else self.weights[name] * loss
            parts.append(term.float())
        return torch.stack(parts).sum()

    def _kl(self, kl: Tensor) -> Tensor:
        """What the objective makes of the KL of each latent dim."""
        if not (self.config.free_bits or self.config.capacity):
            return kl.sum()
        if self.place.world > 1:  # the floor is under, and C is of, the mean over all processes
            kl = kl + (self.place.mean(kl.detach().clone()) - kl.detach())
        if self.config.free_bits:
            return objectives.free_bits(kl, self.config.free_bits)
        return objectives.capacity(kl.sum(), self._now("capacity"))

    def _now(self, name: str) -> Any:
        """beta or capacity at this step: a number, or where a schedule moves it a tensor on the device."""
        return self.schedules[name]() if name in self.schedules else self.held[name]

    @torch.no_grad()
    def _average(self) -> None:
        """ema <- decay ema + (1 - decay) weights; buffers, such as averaged codebooks, are copied."""
        assert self.ema is not None
        self.average(list(self.ema.parameters()), list(self.model.parameters()), None)
        for mine, theirs in zip(self.ema.buffers(), self.model.buffers()):
            mine.copy_(theirs)

    def _rows(self) -> list[list[float]]:
        """What was kept since the last line of the log, over all processes. Here the host waits."""
        rows = self.place.mean(self.window[: self.filled]).tolist()
        for i, row in enumerate(rows):
            found = dict(zip(self.columns, row))
            for name in (*self.terms, "loss"):
                if not math.isfinite(found[name]):
                    step = self.step - self.filled + 1 + i
                    raise NonFinite(f"step {step}: {name} is {found[name]} ({self._last_good()})")
        return rows

    def _record(self) -> dict[str, float]:
        """The log's line of the steps since the last one; they are then forgotten."""
        rows = self._rows()
        seconds = time.perf_counter() - self.since
        means = {name: sum(values) / len(rows) for name, values in zip(self.columns, zip(*rows))}
        images = (self.step - self.clocked) * self.config.batch
        record = {"step": self.step, "epoch": self.step / self.batches.steps_per_epoch,
                  "images_per_s": images / seconds, "seconds": seconds,
                  "lr": self.optimizer.param_groups[0]["lr"], **means}  # fmt: skip
        self.filled, self.clocked, self.since = 0, self.step, time.perf_counter()
        return record

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Time that is not the training's."""
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def _save(self) -> None:
        rows = self._rows()
        finite = torch.stack([p.isfinite().all() for p in self.parameters]).tolist()
        if not all(finite):
            names = [name for name, p in self.model.named_parameters() if p.requires_grad]
            bad = names[finite.index(False)]
            raise NonFinite(f"step {self.step}: parameter {bad} is not finite ({self._last_good()})")
        if self.place.rank == 0:
            try:
                checkpoint.save(self._path(), self._state(rows), self.config.keep)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} ({self._last_good()})") from error
        self.saved = self.step

    def _state(self, rows: list[list[float]]) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "versions": _versions(),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "trunk": self._trunk(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedules": self.schedules.state_dict(),
            "position": self.batches.position,
            "random": checkpoint.random_states(),
            "log": {"columns": self.columns, "terms": self.terms, "rows": rows},
        }

    def _trunk(self) -> str | None:
        """The checksum of what a perceptual loss compares by, which is no part of the model's state."""
        trunk = getattr(self.model, "trunk", None)
        return getattr(trunk, "checksum", None)

    def restore(self, state: dict[str, Any]) -> None:
        if (trunk := state.get("trunk", self._trunk())) != self._trunk():  # older ones do not say
            raise ValueError(f"vgg: the checkpoint is of a run with other weights of VGG16: sha256 {trunk}, "
                             f"got {self._trunk()}")  # fmt: skip
        if state["step"] > self.steps:
            name = "steps" if self.config.steps else "epochs"
            asked = self.config.steps or f"{self.config.epochs}, which are {self.steps} steps"
            raise ValueError(f"{name}: the checkpoint is of step {state['step']} already, got {asked}")
        for name, module in (("model", self.model), ("ema", self.ema)):
            try:
                if module is not None:
                    module.load_state_dict(state[name])
            except RuntimeError as error:
                raise ValueError(f"the checkpoint's {name} does not fit the model: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.schedules.load_state_dict(state["schedules"])
        self.batches.position = tuple(state["position"])
        self.step = self.saved = state["step"]
        log, every = state["log"], self.config.log_every
        self.columns, self.terms = log["columns"], log["terms"]
        self.window = torch.empty(every, len(self.columns), device=self.place.device)
        rows = log["rows"][-(self.step % every) :] if self.step % every else []
        self.filled = len(rows)
        if rows:
            self.window[: self.filled] = torch.tensor(rows)
        checkpoint.restore_random_states(state["random"])
        if state["versions"] != _versions() and self.place.rank == 0:
            print(f"resuming what {state['versions']} wrote with {_versions()}: the bits may differ")

    def _begin(self, fresh: bool) -> None:
        """The folder of the run, its config.json, and what is run, printed."""
        if fresh and checkpoint.found(self.out / "checkpoints"):
            raise FileExistsError(
                f"out: {self.out} holds a run: resume it (--resume {self.out}), or give another"
            )
        if fresh and (self.out / FILE).exists() and (self.out / FILE).stat().st_size:
            raise FileExistsError(
                f"out: {self.out} holds a run that ended before its first checkpoint: remove it, "
                "or give another"
            )
        last = checkpoint.take_up(self.out / "checkpoints", self.step)
        if (self.out / FILE).exists():
            last = max([last, *(record["step"] for record in read(self.out / FILE))])
        settings = {"config": dataclasses.asdict(self.config), "versions": _versions()}
        with atomic(self.out / "config.json") as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
        shape = "x".join(map(str, self.dataset.x.shape[1:]))
        served = serving(self.place.device.type) if self.config.ops.startswith("fused") else "PyTorch"
        compiled = ", torch.compile" if self.config.ops.endswith("compile") else ""
        for name, value in settings["config"].items():
            print(f"{name:<17} {value}")
        print(f"{type(self.model).__name__}: {sum(p.numel() for p in self.parameters):,} parameters")
        data_line = f"{self.dataset.name}: {len(self.dataset.x):,} x {shape}"
        print(f"{data_line}, {self.batches.steps_per_epoch:,} steps an epoch")
        print(f"steps {self.step:,} to {self.steps:,}")
        if last > self.step:
            print(f"steps {self.step + 1:,} to {last:,} of the earlier run move to *.old")
        print(f"{self.place.world} x {self.place.device}, ops by {served}{compiled}", flush=True)

    @torch.no_grad()
    def _draw(self) -> None:
        """Pictures of the first images and of fixed noise."""
        if self.place.rank:
            return
        model, device = self.ema or self.model, self.place.device
        folder, shape = self.out / "grids", tuple(self.dataset.x.shape[1:])
        folder.mkdir(exist_ok=True)
        model.eval()
        x, label = self.dataset.batch(torch.arange(min(SHOWN, len(self.dataset.x))), device)
        x = data.scale(x, self.dataset.peak, model.input_range).reshape(-1, *model.input_shape)
        label = label if model.classes else None
        if hasattr(model, "reconstruct"):
            path = folder / f"reconstructions-{self.step:09d}.png"
            decoded = _picture(model.reconstruct(x, label), model.input_range, shape)
            original = _picture(x, model.input_range, shape)
            plots.reconstructions(path, f"Step {self.step:,}", original, decoded, columns=8)
        if hasattr(model, "sample"):
            label = torch.arange(SHOWN, device=device) % model.classes if model.classes else None
            # No step's noise: its index is beyond them all.
            drawn = model.sample(SHOWN, rng.fold_in(self.noise, 2**62), label)
            path = folder / f"samples-{self.step:09d}.png"
            drawn = _picture(drawn, model.input_range, shape)
            plots.image_grid(path, f"Step {self.step:,}", drawn, columns=8)
        self.model.train()

    def _path(self) -> Path:
        return self.out / "checkpoints" / checkpoint.name(self.step)

    def _last_good(self) -> str:
        return (
            f"the last good checkpoint is of step {self.saved}"
            if self.saved
            else "no checkpoint was made yet"
        )


def _versions() -> dict[str, str | None]:
    """Plain strings: torch's own kind of string is not loaded from a checkpoint."""
    return {name: version and str(version) for name, version in _info._versions().items()}


def _lr_factor(config: Config, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of a step (the first is 0) as a share of `lr`."""
    factor = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.lr_schedule == "cosine":
        done = max(0, step - config.warmup) / max(1, steps - config.warmup)
        factor *= (1 + math.cos(math.pi * done)) / 2
    elif config.lr_schedule == "step":
        factor *= config.lr_drop ** (step // (steps_per_epoch * config.lr_every))
    return factor


def _picture(images: Tensor, input_range: tuple[float, float], shape: tuple[int, ...]):
    """Samples in input_range as [N, H, W], or [N, H, W, 3], in [0, 1]."""
    low, high = input_range
    unit = ((images.float() - low) / (high - low)).clamp(0, 1).reshape(-1, *shape)
    return (unit[:, 0] if shape[0] == 1 else unit.permute(0, 2, 3, 1)).cpu().numpy()
