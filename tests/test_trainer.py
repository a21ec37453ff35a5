"""The trainer: settings, objectives, what a run leaves behind, how it stops, and that it does not wait."""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
image = pytest.importorskip("matplotlib.image")

import trainer_case as case  # noqa: E402

from vaeops import cli, objectives, rng  # noqa: E402
from vaeops.models import MLPVAE, Terms  # noqa: E402
from vaeops.nn import vgg_weights  # noqa: E402
from vaeops.train import checkpoint, log, loop  # noqa: E402
from vaeops.train.config import MAY_CHANGE, Config, differences, make, parse  # noqa: E402


def run(out, model=case.vae, data=None, resume=None, **changes):
    config = case.small(out, **changes)
    return loop.train(config, resume, model=model(), dataset=case.dataset() if data is None else data)


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_settings_are_typed_and_begin_at_the_preset():
    config = parse(["preset=vae-mlp", "lr=3e-4", "batch=32", "tensorboard=true", "beta=none",
                    "model.latent=10", "model.hidden=(8, 4)", "model.recon=mse",
                    "weights.recon=2"])  # fmt: skip
    assert (config.data, config.split, config.epochs) == ("mnist", "train+valid", 30)
    assert (config.lr, config.batch) == (3e-4, 32)
    assert config.tensorboard is True and config.beta is None and config.weights == {"recon": 2.0}
    assert config.model == {"latent": 10, "hidden": (8, 4), "recon": "mse"}
    assert parse(["preset=vae-mlp", "steps=7"]).epochs is None
    assert make("workshop-vae", epochs=2).steps is None
    flags = parse(["preset=ae-mlp", "model.sigmoid=false", "model.a=True", "model.b=none"]).model
    assert flags == {"sigmoid": False, "a": True, "b": None}
    assert parse(["lr=1"], config).model == config.model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["epochss=1"], r"setting 'epochss' is unknown: did you mean 'epochs'"),
        (["lr"], r"settings are key=value, got 'lr'"),
        (["lr=fast"], r"lr must be float, got 'fast'"),
        (["batch=1.5"], r"batch must be int, got '1\.5'"),
        (["tensorboard=1"], r"tensorboard must be bool, got '1'"),
        (["model=10"], r"model is set by model\.ENTRY=VALUE"),
        (["lr.x=1"], r"lr has no entries"),
        (["ops=eager"], r"ops must be one of \('fused', 'fused-compile', 'ref', 'compile'\), got 'eager'"),
        (["batch=0"], r"batch must be finite and at least 1, got 0"),
        (["lr=nan"], r"lr must be finite"),
        (["steps=5", "epochs=5"], r"give one of steps and epochs, got 5 and 5"),
        (["epochs=none"], r"give one of steps and epochs, got None and None"),
        (["ema=1"], r"ema must be in \[0, 1\)"),
        (["weight_decay=0.1"], r"weight_decay is of optimizer='adamw'"),
        (["beta_schedule=linear"], r"beta_schedule 'linear' does not go with beta_steps 0"),
        (["beta_steps=4"], r"beta_schedule 'constant' does not go with beta_steps 4"),
        (["free_bits=1", "capacity=1"], r"give one of free_bits and capacity"),
        (["free_bits=1", "accumulate=2"], r"accumulate must be 1"),
        (["capacity_steps=3"], r"capacity_steps is without capacity"),
        (["weights.kl=1"], r"the KL's weight is beta"),
        (["lr_every=2"], r"lr_every is of lr_schedule='step', got 2 with 'constant'"),
        (["lr_drop=0.1", "lr_schedule=cosine"], r"lr_drop is of lr_schedule='step', got 0\.1 with 'cosine'"),
        (["lr=1", "batch=8", "lr=2"], r"lr is given twice, as '1' and '2'"),
        (["model.latent=1", "model.latent=1"], r"model\.latent is given twice"),
        (["out="], r"out must not be empty"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(["preset=vae-mlp", *settings])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "3"}, r"steps must be int \| None, got '3'"),
        ({"lr": "1e-3"}, r"lr must be float, got '1e-3'"),
        ({"batch": 3.5}, r"batch must be int, got 3\.5"),
        ({"batch": True}, r"batch must be int, got True"),
        ({"tensorboard": 1}, r"tensorboard must be bool, got 1"),
        ({"out": 3}, r"out must be str \| None, got 3"),
        ({"model": "latent=2"}, r"model must be dict\[str, typing\.Any\], got 'latent=2'"),
        ({"weights": {"recon": "2"}}, r"weights must be dict.*, got \{'recon': '2'\}"),
        ({"weights": {"recon": math.nan}}, r"weights\.recon must be finite and at least 0, got nan"),
        ({"weights": {"recon": -1}}, r"weights\.recon must be finite and at least 0, got -1"),
        ({"seed": 10**20}, r"seed must be below 2\^63, got 1000"),
    ],
)
def test_settings_of_another_type(changes, message):
    with pytest.raises(ValueError, match=message):
        make("vae-mlp", **changes)
    assert make("vae-mlp", out=Path("a") / "b").out == "a/b"


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    result = run(tmp_path, checkpoint_every=2, keep=2, grid_every=4, ema=0.5)
    printed = capsys.readouterr()
    assert (
        "lr                0.01" in printed.out
        and "blocks: 64 x 1x4x4, 4 steps an epoch\nsteps 0 to 6" in printed.out
    )
    assert all(f"{name}=" in printed.err for name in ("loss", "recon", "kl")) and "img/s" in printed.err
    lines = log.read(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6] and lines[-1] == result.record
    assert set(lines[0]) >= {"epoch", "images_per_s", "lr", "loss", "recon", "kl", "mu_abs"}
    assert lines[2]["loss"] < lines[0]["loss"]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["config"]["lr"] == 1e-2 and settings["versions"]["torch"] == torch.__version__
    kept = [tmp_path / "checkpoints" / f"step-00000000{step}.pt" for step in (4, 6)]
    assert checkpoint.found(tmp_path / "checkpoints") == kept and result.checkpoint == kept[1]
    for name in ("reconstructions", "samples"):
        assert image.imread(tmp_path / "grids" / f"{name}-000000004.png")[..., :3].std() > 0.05
    assert not result.model.training and not result.ema.training
    with pytest.raises(FileExistsError, match=r"holds a run: resume it \(--resume"):
        run(tmp_path)


def test_what_is_learned_does_not_follow_from_what_is_written(tmp_path):
    bare = run(tmp_path / "a", checkpoint_every=0, log_every=6)
    rich = run(tmp_path / "b", checkpoint_every=1, log_every=1, grid_every=5)
    assert_equal(case.weights(bare), case.weights(rich))
    means = [line["loss"] for line in log.read(tmp_path / "b" / "log.jsonl")]
    assert bare.record["loss"] == pytest.approx(sum(means) / 6, rel=1e-6)
    assert not torch.equal(
        case.weights(run(tmp_path / "c", seed=1))["decoder.0.weight"], case.weights(bare)["decoder.0.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "kl_term"),
    [
        ({}, lambda kl, step: kl.sum()),
        ({"beta": 0.25, "weights": {"recon": 3.0}}, lambda kl, step: 0.25 * kl.sum()),
        ({"beta": 2.0, "beta_schedule": "linear", "beta_steps": 4}, lambda kl, step: 2 * step / 4 * kl.sum()),
        ({"free_bits": 0.05, "beta": 0.5}, lambda kl, step: 0.5 * objectives.free_bits(kl, 0.05)),
        ({"capacity": 8.0, "capacity_steps": 2}, lambda kl, step: (kl.sum() - 4 * step).abs()),
    ],
)
def test_the_objective(tmp_path, changes, kl_term):
    """The losses of two steps, against the model's own terms and plain Adam."""
    run(tmp_path, steps=2, log_every=1, **changes)
    model, data = case.vae(), case.dataset()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = loop.data.Batches(64, 16, 0)
    noise = rng.make_seed(generator=torch.Generator().manual_seed(0))
    for step, line in enumerate(log.read(tmp_path / "log.jsonl")):
        x, _ = data.batch(next(batches))
        losses, _ = model.terms(x.flatten(1).float() / 255, seed=rng.fold_in(noise, step))
        weight = changes.get("weights", {"recon": 1.0})["recon"]
        total = weight * losses["recon"] + kl_term(losses["kl"], step)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        assert line["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
        assert line["kl"] == pytest.approx(float(losses["kl"].detach().sum()), rel=1e-4)
        if "beta_steps" in changes:
            assert line["beta"] == pytest.approx(2 * step / 4)


@pytest.mark.parametrize("model", [case.vae, case.vq])
def test_micro_batches_train_what_the_whole_batch_does(tmp_path, model):
    """Up to rounding, which Adam lets grow."""
    whole = run(tmp_path / "whole", model)
    parts = run(tmp_path / "parts", model, accumulate=4)
    for name, value in case.weights(parts).items():
        torch.testing.assert_close(value, case.weights(whole)[name], rtol=1e-4, atol=2e-5)
    assert parts.record["recon"] == pytest.approx(whole.record["recon"], rel=1e-5)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_log(tmp_path, stop):
    """Stopped between two lines of the log, and at one; its last line is cut off, as a kill leaves it."""
    options = {"ema": 0.9, "clip": 0.5, "warmup": 3, "lr_schedule": "cosine", "beta_schedule": "cyclical",
               "beta_steps": 6, "checkpoint_every": 1, "keep": 9}  # fmt: skip
    straight = run(tmp_path / "a", **options)
    resumed = run(tmp_path / "b", **options)
    for path in checkpoint.found(tmp_path / "b" / "checkpoints")[stop:]:
        path.unlink()
    with (tmp_path / "b" / "log.jsonl").open("a") as file:
        file.write('{"step": 7')
    resumed = run(tmp_path / "b", resume=tmp_path / "b", **options)
    assert_equal(case.weights(resumed), case.weights(straight))
    assert_equal(resumed.ema.state_dict(), straight.ema.state_dict())
    logs = [log.read(tmp_path / name / "log.jsonl") for name in "ab"]
    for line in (line for lines in logs for line in lines):
        del line["images_per_s"], line["seconds"]
    assert logs[0] == logs[1]


def test_a_run_taken_up_at_an_earlier_step_keeps_its_later_checkpoints_aside(tmp_path, capsys):
    straight = run(tmp_path, checkpoint_every=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert "the earlier run" not in capsys.readouterr().out
    half = tmp_path / "checkpoints" / f".{checkpoint.name(7)}.4321"
    half.touch()
    resumed = run(tmp_path, resume=tmp_path / "checkpoints" / checkpoint.name(2), steps=4)
    assert not half.exists()
    assert "steps 3 to 6 of the earlier run move to *.old" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl.old").read_text().splitlines() == lines[1:]
    assert resumed.record["step"] == 4 and checkpoint.load(tmp_path)["step"] == 4
    assert (tmp_path / "checkpoints" / f"{checkpoint.name(6)}.old").exists()
    assert_equal(case.weights(run(tmp_path, resume=tmp_path)), case.weights(straight))


def test_averaged_weights(tmp_path):
    """ema <- 0.75 ema + 0.25 weights after each step, from the initial weights on; buffers are copied."""
    expected = case.vq().state_dict()
    result = run(tmp_path, case.vq, steps=4, ema=0.75, checkpoint_every=1, keep=9)
    buffers = {name for name, _ in result.model.named_buffers()}
    for path in checkpoint.found(tmp_path / "checkpoints"):
        state = checkpoint.load(path)
        for name, value in state["model"].items():
            expected[name] = value if name in buffers else 0.75 * expected[name] + 0.25 * value
        for name, value in expected.items():
            torch.testing.assert_close(state["ema"][name], value, msg=name)


def test_learning_rates(tmp_path):
    def rates(name, **changes):
        run(tmp_path / name, log_every=1, steps=8, **changes)
        return [line["lr"] for line in log.read(tmp_path / name / "log.jsonl")]

    assert rates("a", lr=0.4, warmup=4)[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    cosine = rates("b", lr=0.1, warmup=2, lr_schedule="cosine")
    assert cosine == pytest.approx([0.05, 0.1, *(0.05 * (1 + math.cos(math.pi * i / 6)) for i in range(6))])
    assert rates("c", lr=0.1, lr_schedule="step", lr_drop=0.1) == pytest.approx([0.1] * 4 + [0.01] * 4)


class Syncs(TorchDispatchMode):
    """Counts how often a tensor's value goes to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", [case.vae, case.vq])
def test_steps_do_not_wait_for_the_device(tmp_path, monkeypatch, model):
    """As many reads for 2 steps as for 12: those of the log's line and of the checkpoint."""
    reads = []
    for name in ("tolist", "numpy", "cpu"):
        own = getattr(torch.Tensor, name)
        counted = lambda self, *a, own=own: reads.append(1) or own(self, *a)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, counted)
    monkeypatch.setattr(loop.data.Dataset, "batch", gather)
    options = {"ema": 0.9, "clip": 1.0, "accumulate": 2}
    if model is case.vae:
        options |= {"beta_schedule": "linear", "beta_steps": 5}
    counts = []
    for steps in (2, 12):
        reads.clear()
        with Syncs() as syncs:
            run(tmp_path / str(steps), model, steps=steps, log_every=steps, **options)
        counts.append((syncs.count, len(reads)))
    assert counts[0] == counts[1] and counts[0][1] > 0
    with Syncs() as syncs:
        float(torch.ones(()))
    assert syncs.count == 1


def gather(self, indices, device="cpu"):
    """What a data set that lives on the device does."""
    return torch.as_tensor(self.x).index_select(0, indices), None


def breaks(at, term):
    class Breaks(MLPVAE):
        calls = 0

        def terms(self, *args, **options):
            self.calls += 1
            losses, monitors = super().terms(*args, **options)
            if self.calls == at:
                losses = {**losses, term: losses[term] * math.inf}
            return Terms(losses, monitors)

    model = case.vae()
    model.__class__ = Breaks
    return lambda: model


@pytest.mark.parametrize(("at", "term", "every"), [(4, "recon", 2), (5, "kl", 1), (3, "recon", 3)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, at, term, every):
    """Named with its own step; a checkpoint of that step or later is not written."""
    good = (at - 1) // every * every
    last = f"the last good checkpoint is of step {good}" if good else "no checkpoint was made yet"
    with pytest.raises(loop.NonFinite, match=rf"^step {at}: {term} is (inf|nan) \({last}\)"):
        run(tmp_path, breaks(at, term), checkpoint_every=every, keep=9, log_every=6)
    found = checkpoint.found(tmp_path / "checkpoints")
    assert [p.name for p in found] == [checkpoint.name(step) for step in range(every, good + 1, every)]


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path):
    def broken():
        model = case.vae()
        model.decoder[0].weight.register_hook(lambda grad: grad * math.nan)
        return model

    with pytest.raises(loop.NonFinite, match=r"step 1: parameter decoder\.0\.weight is not finite"):
        run(tmp_path, broken, checkpoint_every=1)
    assert not checkpoint.found(tmp_path / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_where(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match=r"stopped after step 3; saved .*step-000000003\.pt") as stop:
        run(tmp_path / "a", lambda: case.interrupted(3, number))
    assert stop.value.signal == number and signal.getsignal(number) is before
    resumed = run(tmp_path / "a", resume=tmp_path / "a")
    assert_equal(case.weights(resumed), case.weights(run(tmp_path / "b")))


def test_autocast_keeps_losses_in_fp32(tmp_path):
    seen = []

    class Watched(MLPVAE):
        def terms(self, *args, **options):
            hidden = self.encoder[0](args[0])
            losses, monitors = super().terms(*args, **options)
            seen.append((hidden.dtype, {loss.dtype for loss in losses.values()}))
            return Terms(losses, monitors)

    def watched():
        model = case.vae()
        model.__class__ = Watched
        return model

    exact = run(tmp_path / "a").record["loss"]
    rough = run(tmp_path / "b", watched, amp="bf16").record["loss"]
    assert set(map(str, seen)) == {str((torch.bfloat16, {torch.float32}))}
    assert rough != exact and rough == pytest.approx(exact, rel=0.02)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"amp='fp16' needs a GPU.*use 'bf16'"):
            run(tmp_path / "c", amp="fp16")


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path / "a", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    scalar = events.Scalars("loss")[-1]
    assert scalar.step == 6 and scalar.value == pytest.approx(result.record["loss"])
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package tensorboard, which is not installed"):
        run(tmp_path / "b", tensorboard=True)


def test_what_does_not_fit(tmp_path):
    def wide():
        return MLPVAE(25, (12,), 4)

    def with_labels():
        return MLPVAE(16, (12,), 4, classes=1)

    cases = [
        ({"model": wide}, r"small takes samples of \(25,\), those of blocks are \(1, 4, 4\)"),
        ({"data": case.dataset(0)}, r"blocks has no samples"),
        ({"data": case.dataset(8)}, r"batch must be 1 to the data set's 8 rows, got 16"),
        ({"accumulate": 3}, r"batch 16 over 1 processes must be a multiple of accumulate, got 3"),
        ({"model": case.vq, "beta": 0.5}, r"beta: small has no KL, its losses are recon, commit"),
        (
            {"weights": {"recn": 1.0}},
            r"loss term 'weights\.recn' is unknown: did you mean 'weights\.recon' or 'weights\.kl'\?",
        ),
        ({"model": with_labels}, r"small takes labels below 1, blocks has 1"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **changes)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_checkpoint_that_does_not_fit(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"other settings: batch: 16 became 32; lr: 0\.01 became 0\.1$"):
        run(tmp_path / "a", resume=tmp_path / "a", batch=32, lr=0.1, steps=9)
    message = r"(?s)the checkpoint's model does not fit the model: .*encoder\.0\.weight"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a", resume=tmp_path / "a", model=lambda: MLPVAE(16, (20,), 4), steps=9)
    assert set(MAY_CHANGE) < set(Config.__dataclass_fields__)


@pytest.mark.parametrize("fewer", [{"steps": 3}, {"steps": None, "epochs": 1}])
def test_a_run_is_not_resumed_to_fewer_steps_than_it_has_done(tmp_path, fewer):
    run(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"the checkpoint is of step 6 already, got (3|1, wh)"):
        run(tmp_path, resume=tmp_path, **fewer)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_run_that_ended_before_its_first_checkpoint(tmp_path):
    with pytest.raises(loop.NonFinite):
        run(tmp_path, breaks(1, "recon"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: its run ended before the first one"):
        run(tmp_path, resume=tmp_path)
    with pytest.raises(loop.NonFinite):  # nothing was logged, and nothing is lost by running it anew
        run(tmp_path, breaks(5, "recon"))
    with pytest.raises(FileExistsError, match="before its first checkpoint: remove it, or give another"):
        run(tmp_path)


def test_a_finished_run_without_its_log_is_resumed(tmp_path):
    first = run(tmp_path, steps=2)
    assert run(tmp_path, steps=2, resume=tmp_path).record == first.record
    (tmp_path / "log.jsonl").unlink()
    result = run(tmp_path, steps=2, resume=tmp_path)
    assert result.record == {} and result.checkpoint == first.checkpoint


def test_a_run_goes_on_with_the_same_trunk(tmp_path):
    """The file may be elsewhere; its weights are the same, and there is one if there was one."""

    def judged(checksum):
        model = case.vae()
        object.__setattr__(model, "trunk", SimpleNamespace(checksum=checksum))
        return lambda: model

    run(tmp_path, judged("aa"), steps=1)
    with pytest.raises(ValueError, match=r"vgg: .* of a run with other weights .* aa, got bb"):
        run(tmp_path, judged("bb"), resume=tmp_path)
    run(tmp_path, judged("aa"), resume=tmp_path)
    old = {**dataclasses.asdict(case.small(tmp_path)), "vgg": "a.pth"}
    assert differences(old, case.small(tmp_path)) == ["vgg: 'a.pth' became None"]
    assert not differences(old, dataclasses.replace(case.small(tmp_path), vgg="b.pth"))


def test_the_command(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "tiny-2d", "--out", str(out), "steps=4", "log_every=2", "model.hidden=(8,)"]
    assert cli.main(command) == 0
    assert cli.main(command) == 2
    assert "holds a run: resume it" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(out), "steps=6"]) == 0
    assert [line["step"] for line in log.read(out / "log.jsonl")] == [2, 4, 6]
    moved = copy.copy(out.rename(tmp_path / "moved"))
    assert cli.main(["train", "--resume", str(moved), "steps=8"]) == 0 and not out.exists()
    copied = str(shutil.copy(checkpoint.resolve(moved), tmp_path / "copied.pt"))
    for arguments, message in (
        (["--resume", copied], "copied.pt lies in no run's folder checkpoints: give a folder to go on in"),
        (["--resume", str(moved), "lr=1"], "other settings: lr: 0.02 became 1.0"),
        (["vae-conv", "--resume", str(moved)], "other settings: preset: 'tiny-2d' became 'vae-conv'"),
        (["--resume", str(moved), "model.latent=3"], "other settings: model: {'hidden': [8]} became"),
        (["tiny-2dd"], "tiny-2d"),
        (["tiny-2d", "--data", "point"], "points"),
        (["tiny-2d", "model.latnt=3"], "latent"),
        (["tiny-2d", "data=digits", "--out", str(tmp_path / "c")], "those of digits are integers of 0 to 16"),
        (["tiny-2d", "bach=3"], "did you mean 'batch'"),
        (["vae-mlp", "--root", str(tmp_path)], "there is no train-images-idx3-ubyte"),
        (["--resume", str(tmp_path / "nothing")], "there is no checkpoint"),
        ([], "preset is missing"),
    ):
        assert cli.main(["train", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert cli.main(["train", "tiny-2d", "--out", str(tmp_path / "b"), "steps=9", "lr=1e30"]) == 3
    assert "no checkpoint was made yet" in capsys.readouterr().err


def test_the_command_ends_at_ctrl_c(tmp_path, capsys):
    def interrupt():
        while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").stat().st_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert cli.main(["train", "tiny-2d", "--out", str(tmp_path), "steps=1000000", "log_every=10"]) == 130
    thread.join()
    printed = capsys.readouterr().err
    step = checkpoint.load(tmp_path)["step"]
    assert f"stopped after step {step}; saved {checkpoint.resolve(tmp_path)}; go on with --resume" in printed


def test_sizes_follow_from_the_data(tmp_path):
    options = {"data": "digits", "split": "train", "steps": 2, "grid_every": 0, "out": str(tmp_path)}
    result = loop.train(make("vae-mlp", **options))
    assert result.model.input_shape == (64,)
    assert checkpoint.load(tmp_path)["config"]["model"] == {"in_dim": 64}
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vae-mlp", "vq-vae"])
def test_every_kind_of_ops_trains_alike(tmp_path, model):
    losses = {}
    for ops in ("fused", "fused-compile", "ref", "compile"):
        options = {
            "data": "digits",
            "split": "train",
            "steps": 5,
            "batch": 32,
            "log_every": 1,
            "grid_every": 0,
        }
        loop.train(make(model, ops=ops, out=str(tmp_path / ops), **options))
        losses[ops] = [line["loss"] for line in log.read(tmp_path / ops / "log.jsonl")]
    for found in losses.values():
        assert found == pytest.approx(losses["ref"], rel=1e-4)


@pytest.mark.slow
def test_a_perceptual_loss_from_a_file(tmp_path):
    drawn = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=drawn) / 50 for key, shape in vgg_weights.layout("vgg16")}
    torch.save(state, tmp_path / "vgg16.pth")
    x = torch.randint(256, (8, 3, 64, 64), generator=drawn, dtype=torch.uint8).numpy()
    options = {"steps": 2, "batch": 4, "log_every": 1, "grid_every": 0, "vgg": str(tmp_path / "vgg16.pth"),
               "weights": {"perceptual": 0.5}, "out": str(tmp_path / "run")}  # fmt: skip
    config = make("celeba-vae", **options)
    record = loop.train(config, dataset=loop.data.Dataset("noise", x)).record
    assert record["loss"] == pytest.approx(
        record["recon"] + record["kl"] + 0.5 * record["perceptual"], rel=1e-5
    )


def test_a_vgg_for_a_model_that_has_no_use_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"^vgg: vae-mlp has no perceptual loss"):
        loop.train(make("vae-mlp", vgg="vgg16.pth", steps=1, out=str(tmp_path / "run")))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_steps_do_not_wait_for_a_gpu(tmp_path, monkeypatch, amp):
    """CUDA itself raises at a wait, but where the trainer reads what it logs and saves."""
    own = loop._Trainer._step

    def step(self):
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")
        try:
            own(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Trainer, "_step", step)
    for model in (case.vae, case.vq):
        result = run(tmp_path / model.__name__, model, amp=amp, ema=0.9, clip=1.0, device="cuda")
        assert math.isfinite(result.record["loss"])
