"""Checkpoints: the whole state of a training in a file that is either complete or not there."""

import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import models
from .._files import atomic
from .log import FILE

FORMAT = 1  # of the state, settings included; any other one is refused
_NAME = re.compile(r"step-(\d{9})\.pt")


def name(step: int) -> str:
    return f"step-{step:09d}.pt"


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))


def take_up(folder: Path, step: int) -> int:
    """Make a folder ready for a run that goes on after `step`; the last step of what it leaves, or `step`.

    Checkpoints of a later step are of a past that this run leaves: they get the ending .old. What a killed
    process had half written goes.
    """
    last = step
    for path in found(folder):
        if path.name > name(step):
            path.replace(path.with_suffix(".pt.old"))
            last = int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
    for part in folder.glob(".step-*.pt.*"):
        part.unlink()
    return last


def save(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write the state, then remove all but the newest `keep` checkpoints beside it."""
    content = io.BytesIO()  # torch.save into a file hides why the disk refused
    torch.save({"format": FORMAT, **state}, content)
    with atomic(path) as file:
        file.write(content.getbuffer())
    for old in found(path.parent)[:-keep]:
        old.unlink()


def load(path: Path | str) -> dict[str, Any]:
    """A checkpoint's state, on the CPU, without running code from the file.

    Args:
        path: of the file, or the folder of a run, whose newest checkpoint is then taken.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no checkpoint of a training, or of another version's format.
    """
    path = resolve(path)
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or foreign file fails in many ways; one cut off, by OSError
            older = [other for other in found(path.parent) if other.name < path.name]
            hint = f"; the one before it is {older[-1]}" if older and _NAME.fullmatch(path.name) else ""
            raise ValueError(f"{path} is no checkpoint of vaeops train, or is damaged{hint}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is no checkpoint of vaeops train")
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']} (vaeops {state['versions']['vaeops']}), "
                         f"this vaeops reads format {FORMAT}")  # fmt: skip
    return state


def load_model(path: Path) -> tuple[Any, dict[str, Any], str]:
    """(model in eval mode, its training's settings, what was loaded in words) of a checkpoint or saved model.

    Of a checkpoint, or of the newest one in a run's folder, the averaged weights where there are any. A
    .safetensors file is a saved model, whose training is not known: no settings. The trunk of a perceptual
    loss is in neither.
    """
    if path.suffix == ".safetensors":
        return models.load(path).eval(), {}, "saved model"
    state = load(path)
    config = state["config"]
    model = models.create(config["preset"], **config["model"])
    averaged = state["ema"] is not None
    model.load_state_dict(state["ema"] if averaged else state["model"])
    return model.eval(), config, f"{'averaged weights' if averaged else 'weights'} of step {state['step']:,}"


def resolve(path: Path | str) -> Path:
    """The file that a path means."""
    path = Path(path)
    if path.is_dir():
        checkpoints = found(path / "checkpoints") or found(path)
        if not checkpoints:
            why = ": its run ended before the first one, begin anew" if (path / FILE).exists() else ""
            raise FileNotFoundError(f"there is no checkpoint in {path}{why}")
        return checkpoints[-1]
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    return path


def random_states() -> dict[str, Any]:
    """The states of every global generator, of types that load without pickled code."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss),
                  float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
