"""Quantizer layers over several processes (gloo, on CPU) against one process on the joined batch."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vaeops.compat import audiocraft, lucidrains
from vaeops.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize, update_codebooks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"
)
WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]
STEPS, DIM = 4, 4


def shares(world, step):
    """How many rows of a step's joined batch each rank has: uneven, and none for some."""
    total = (60, 41, 7, 30)[step]
    cuts = sorted((total * (3 * r + step) // (3 * world)) for r in range(1, world))
    if step == 1:
        cuts = [0] * (world - 1)  # all rows on the last
    return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


def batch(step):
    torch.manual_seed(100 + step)
    x = torch.randn(sum(shares(1, step)), DIM) * torch.logspace(-2, 2, DIM)
    mask = torch.rand(len(x)) < 0.8
    if step == 2:
        x[3, 1] = torch.nan
    return x, mask


class Two(nn.Module):
    """Two layers whose statistics go in one buffer."""

    def __init__(self, **options):
        super().__init__()
        self.a, self.b = (
            VectorQuantize(DIM, 8, accumulate=True, **options),
            VectorQuantize(DIM, 6, accumulate=True, **options),
        )

    def forward(self, x, mask):
        return self.b(self.a(x, mask).quantized, mask)


LAYERS = {
    "ema": lambda **o: VectorQuantize(DIM, 8, decay=0.8, **o),
    "cosine": lambda **o: VectorQuantize(DIM, 8, metric="cosine", **o),
    "heads": lambda **o: VectorQuantize(DIM, 8, heads=2, separate_codebook_per_head=True, **o),
    "revive": lambda **o: VectorQuantize(DIM, 40, revive_below=0.7, decay=0.5, **o),
    "kmeans": lambda **o: VectorQuantize(DIM, 8, kmeans_init=True, kmeans_iters=3, **o),
    "residual": lambda **o: ResidualVQ(DIM, 8, 3, kmeans_init=True, kmeans_iters=2, revive_below=0.5, **o),
    "grouped": lambda **o: GroupedResidualVQ(DIM, 8, 2, groups=2, **o),
    "two": lambda **o: Two(**o),
    "learned": lambda **o: VectorQuantize(DIM, 20, ema=False, revive_below=0.7, decay=0.5, **o),
}


def make(name, mode):
    torch.manual_seed(0)
    return LAYERS[name](deterministic=mode)


def run(layer, world, rank, call=None):
    """The layer's state after each step; every rank takes its share of the joined batch."""
    history = []
    for step in range(STEPS):
        x, mask = batch(step)
        first = sum(shares(world, step)[:rank])
        part = slice(first, first + shares(world, step)[rank])
        (layer if call is None else call)(x[part], mask[part])
        if isinstance(layer, Two):
            update_codebooks(layer)
        history.append({k: v.clone() for k, v in layer.state_dict().items()})
    return history


def run_compiled(layer, world, rank):
    """Collectives are in the graph: fullgraph raises at a break."""
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    return run(layer, world, rank, call)


def counting(counted, all_reduce):
    def counts(tensor, op=dist.ReduceOp.SUM, **options):
        counted.append((tensor.dtype, tensor.numel(), op))
        return all_reduce(tensor, op, **options)

    return counts


def worker(rank, world, path):
    """One process: every layer in both modes, then what else needs several. Results go to a file."""
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", world_size=world, rank=rank)
    torch.set_num_threads(1)
    counted, results, all_reduce = [], {}, dist.all_reduce
    dist.all_reduce = counting(counted, all_reduce)
    for name in LAYERS:
        for mode in (None, "bitwise"):
            counted.clear()
            results[name, mode] = run(make(name, mode), world, rank)
            results[name, mode, "reduces"] = list(counted)
    dist.all_reduce = all_reduce
    results["ddp"] = data_parallel(world, rank)
    results["compiled"] = run_compiled(make("revive", "bitwise"), world, rank)
    results["absent"] = absent(rank)
    results["lucidrains"] = others(lucidrains.VectorQuantize(DIM, 8, threshold_ema_dead_code=1), rank)
    results["lucidrains residual"] = others(
        lucidrains.ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=8), rank
    )
    results["lucidrains dropout"] = others(
        lucidrains.ResidualVQ(dim=DIM, num_quantizers=6, codebook_size=8, quantize_dropout=True), rank
    )
    results["lucidrains first"] = others(
        lucidrains.VectorQuantize(DIM, 8, kmeans_init=True, sync_kmeans=False), rank
    )
    results["lucidrains affine"] = others(
        lucidrains.VectorQuantize(DIM, 8, affine_param=True, sync_affine_param=True), rank
    )
    in_place = partial(torch.optim.SGD, lr=0.1)
    results["lucidrains in place"] = others(
        lucidrains.VectorQuantize(
            DIM, 8, learnable_codebook=True, ema_update=False, in_place_codebook_optimizer=in_place
        ),
        rank,
    )
    results["local"] = others(lucidrains.VectorQuantize(DIM, 8, sync_codebook=False), rank)
    results["audiocraft"] = others(audiocraft.EuclideanCodebook(DIM, 8, kmeans_init=True), rank)
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def absent(rank):
    """A process that had no batch at all still takes part in the update."""
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, 8, accumulate=True, revive_below=0.9, decay=0.5)
    for step in range(3):
        if (rank + step) % 2 == 0:
            layer(torch.randn(30, DIM, generator=torch.Generator().manual_seed(step)).bfloat16())
        layer.update()
    return layer.state_dict()


def others(layer, rank):
    with torch.no_grad():
        for p in (*layer.parameters(), *layer.buffers()):
            dist.broadcast(p, 0)
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        layer(torch.randn(2, 9 + rank, DIM))
    return layer.state_dict()


def data_parallel(world, rank):
    """Wrapped in DistributedDataParallel, which broadcasts buffers, with micro-batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), VectorQuantize(DIM, 8, accumulate=True, revive_below=0.5))
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        for micro in range(2):
            torch.manual_seed(1000 * step + 10 * micro + rank)
            out = wrapped(torch.randn(20, DIM))
            (out.commit_loss + out.quantized.square().mean()).backward()
        optimizer.step()
        model[1].update()
    return model.state_dict()


@pytest.fixture(scope="module", params=WORLDS)
def results(request, tmp_path_factory):
    path, world = tmp_path_factory.mktemp("ranks"), request.param
    here = Path(__file__).resolve()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    code = "import sys, test_distributed as t; t.worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(r), str(world), str(path)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    errors = [r.communicate(timeout=240)[1] for r in ranks]
    assert not any(r.returncode for r in ranks), "\n".join(errors)
    return world, [torch.load(path / f"{r}.pt", weights_only=False) for r in range(world)]


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("mode", [None, "bitwise"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_process_has_the_same_codebook_and_it_is_that_of_one_process(results, name, mode):
    """Bit for bit between processes; against one alone bit for bit in bitwise mode, else up to rounding."""
    _, ranks = results
    alone = run(make(name, mode), 1, 0)
    for step in range(STEPS):
        for rank in ranks[1:]:
            assert_equal(rank[name, mode][step], ranks[0][name, mode][step])
        one, many = alone[step], ranks[0][name, mode][step]
        if mode == "bitwise":
            assert_equal(many, one)
        else:
            for key in one:
                torch.testing.assert_close(many[key], one[key], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(alone[0].values(), alone[-1].values()))


def test_one_flat_all_reduce_a_step(results):
    """Counts and sums of all codebooks in one; one more for the scale; one more for who has how many rows."""
    _, ranks = results
    floats = {None: torch.float32, "bitwise": torch.int64}
    for name, sizes in (("ema", 8 * 5), ("heads", 2 * 8 * 3), ("grouped", 4 * 8 * 3), ("two", 14 * 5)):
        for mode, dtype in floats.items():
            calls = ranks[0][name, mode, "reduces"]
            assert len(calls) == STEPS * (1 if mode is None else 2)
            flat = [(d, n) for d, n, op in calls if op == dist.ReduceOp.SUM]
            assert flat == [(dtype, sizes)] * STEPS
    assert len(ranks[0]["revive", None, "reduces"]) == 2 * STEPS


def test_collectives_compile(results):
    _, ranks = results
    for rank in ranks:
        assert_equal(rank["compiled"][-1], rank["revive", "bitwise"][-1])


@pytest.mark.parametrize(
    "name",
    ["ddp", "absent", "lucidrains", "lucidrains residual", "lucidrains dropout", "lucidrains first",
     "lucidrains affine", "lucidrains in place", "audiocraft"],
)  # fmt: skip
def test_other_layers_agree_on_all_processes(results, name):
    _, ranks = results
    for rank in ranks[1:]:
        assert_equal(rank[name], ranks[0][name])


def test_a_codebook_that_is_not_synchronised_is_each_process_own(results):
    _, ranks = results
    assert not torch.equal(ranks[0]["local"]["_codebook.embed"], ranks[1]["local"]["_codebook.embed"])
