"""`vaeops plot`: every kind, from small models of digits and drawn faces; and what it says is missing."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("safetensors")
mpl = pytest.importorskip("matplotlib")
image = pytest.importorskip("matplotlib.image")
Image = pytest.importorskip("PIL.Image")

from vaeops import cli, models  # noqa: E402
from vaeops.train import data, evaluate, pictures, plots  # noqa: E402

SMALL = {"in_dim": 64, "hidden": (32,)}
SIDE = 16  # of a drawn face


def make(preset, **overrides):
    torch.manual_seed(0)
    return models.create(preset, **overrides).eval()


def trained(model, dataset, steps):
    """Some steps on a whole data set: enough that a picture of it shows something."""
    x = data.scale(torch.tensor(dataset.x), dataset.peak, model.input_range).view(-1, *model.input_shape)
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    for step in range(steps):
        losses = model.terms(x, seed=torch.tensor([step, 0])).losses
        sum(model.weights[name] * loss.sum() for name, loss in losses.items()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def faces(folder):
    """CelebA's layout: 240 drawn faces, of them 96 for testing, half with glasses, half with a smile."""
    names = ["Smiling", "Eyeglasses", *(f"Attribute_{i}" for i in range(37)), "Bald"]
    drawn, lines = np.random.default_rng(0), []
    (folder / "img_align_celeba").mkdir(parents=True)
    for i in range(240):
        face = np.full((SIDE, SIDE, 3), drawn.integers(140, 230, 3), np.uint8)
        face[5:7, [4, 5, 10, 11]] = 40
        if smiling := i % 2:
            face[11, 4:12] = 255
        if glasses := i // 2 % 2:
            face[4:8, 2:14] = face[4:8, 2:14] // 3
        Image.fromarray(face).save(folder / "img_align_celeba" / f"{i:03d}.png")
        has = [smiling, glasses, *(i // 4 % 2 for _ in range(37)), i > 230]
        lines.append(f"{i:03d}.png " + " ".join("1" if one else "-1" for one in has))
    (folder / "list_attr_celeba.txt").write_text("\n".join(["240", " ".join(names), *lines]))
    parts = "".join(f"{i:03d}.png {2 if i % 5 < 2 else 0}\n" for i in range(240))
    (folder / "list_eval_partition.txt").write_text(parts)
    return folder


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Fewer dots: most of a picture's time goes into them."""
    monkeypatch.setattr(plots, "DPI", 60)
    monkeypatch.setitem(plots._STYLE, "savefig.dpi", 60)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models are small: on a busy machine threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory, _one_thread):
    """A folder of saved models, a run with a log, drawn faces and grey noise of the digits' size."""
    folder = tmp_path_factory.mktemp("plot")
    digits = data.load("digits")
    celeba = data.load("celeba", faces(folder / "celeba"), size=SIDE)
    made = {
        "vae2": trained(make("vae-mlp", **SMALL, latent=2), digits, 80),
        "ae2": trained(make("ae-mlp", **SMALL, latent=2), digits, 80),
        "vae": trained(make("vae-mlp", **SMALL, latent=6), digits, 60),
        "denoise": trained(make("ae-denoise", in_dim=64, hidden=(32,), latent=8, dropout=0.0), digits, 60),
        "vq": trained(make("workshop-vq", **SMALL, dim=8, codes=12), digits, 60),
        "face": trained(make("ae-conv", channels=3, side=SIDE, latent=8, widths=(8, 16)), celeba, 60),
        "cvae": make("cvae", **SMALL, latent=2),
        "ddpm": make("ddpm-tiny", side=8, width=8, steps=6),
        "convvq": make("vq-vae", channels=1, side=8, hidden=8, inner=4, dim=4, codes=8),
        "prior": make("code-prior", codes=12, length=1, width=8, layers=1, heads=1),
        "points": make("tiny-2d"),
    }
    for name, model in made.items():
        models.save(model, folder / f"{name}.safetensors")
    (folder / "noise").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "noise" / f"{i}.png")
    for name, lr in (("run", 1.0), ("other", 1.3)):
        (folder / name).mkdir()
        records = [
            {
                "step": 50 * i,
                "epoch": i,
                "images_per_s": 9.0,
                "seconds": 1.0,
                "lr": lr,
                "loss": lr * 90 / i,
                "recon": 80 / i,
                "kl": 10 * lr / i,
                "mu_abs": None if i == 2 else 0.1,
            }
            for i in range(1, 9)
        ]
        (folder / name / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def plot(place, capsys, kind, *arguments, runs=(), out="p.png", code=0):
    """(the pixels, the figures that were printed), or of a failure its message."""
    paths = [str(place / (f"{run}.safetensors" if (place / f"{run}.safetensors").exists() else run))
             for run in runs]  # fmt: skip
    capsys.readouterr()
    assert cli.main(["plot", kind, *paths, *arguments, "--out", str(place / out)]) == code
    printed = capsys.readouterr()
    if code:
        assert printed.err.startswith("vaeops plot: ")
        return printed.err.removeprefix("vaeops plot: ").strip()
    head, *lines = printed.out.splitlines()
    assert head == f"{place / out}: {kind} of {', '.join(runs)}"
    return image.imread(place / out)[..., :3], {
        name.strip(): float(value) for name, value in (line.rsplit(maxsplit=1) for line in lines)
    }


def shows_something(pixels):
    """Not blank, not of a few colours, drawn in more than a corner."""
    drawn = (pixels < 0.85).any(2)
    colours = (pixels * 255).round().astype(int) @ (1, 256, 65536)
    assert len(np.unique(colours)) > 30
    assert drawn.mean() > 0.005 and drawn.any(0).mean() > 0.4 and drawn.any(1).mean() > 0.25


DIGITS = ("--data", "digits")
CELEBA = ("--data", "celeba")
EVERY = {
    "reconstructions": (("vae2", "ae2", "denoise"), DIGITS),
    "losses": (("run", "other"), ()),
    "latent": (("vae2", "ae2", "cvae"), DIGITS),
    "pca": (("vae", "ae2"), DIGITS),
    "tsne": (("vae",), (*DIGITS, "--samples", "120", "--perplexity", "10")),
    "manifold": (("vae2", "ae2"), (*DIGITS, "--side", "9")),
    "samples": (("prior",), ("--images", "20")),
    "holes": (("vae2", "ae2"), (*DIGITS, "--images", "12", "--samples", "200")),
    "interpolation": (("vae", "ae2"), (*DIGITS, "--pairs", "2", "--method", "spherical")),
    "directions": (("face",), (*CELEBA, "--recipe", "Eyeglasses - Smiling", "--images", "5")),
    "plane": (("face",), (*CELEBA, "--side", "7")),
    "codebook": (("vq",), ()),
    "codes": (("vq",), DIGITS),
    "anomaly": (("vae", "ae2"), (*DIGITS, "--outliers", "images")),
    "kl": (("vae", "vae2", "cvae"), DIGITS),
    "denoising": (("ddpm",), ("--images", "3", "--steps", "3")),
}


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_every_kind(place, capsys, kind):
    runs, arguments = EVERY[kind]
    arguments = [*arguments]
    if "--data" in arguments:
        arguments += ["--root", str(place / "noise" if "images" in arguments else place)]
    if kind == "samples":
        arguments += ["--decoder", str(place / "vq.safetensors")]
    pixels, _ = plot(place, capsys, kind, *arguments, runs=runs, out=f"{kind}.png")
    shows_something(pixels)


def test_models_side_by_side_differ(place, capsys):
    both, _ = plot(place, capsys, "latent", *DIGITS, runs=("vae2", "ae2"))
    one, _ = plot(place, capsys, "latent", *DIGITS, runs=("vae2",))
    same, _ = plot(place, capsys, "latent", *DIGITS, runs=("vae2",), out="again.png")
    assert np.array_equal(one, same) and both.shape[1] > 1.5 * one.shape[1]
    half = both.shape[1] // 2
    assert np.abs(both[:, :half] - both[:, half : 2 * half]).mean() > 0.01


# ---- figures


@torch.no_grad()
def test_figures_of_the_codes(place, capsys):
    model, test = models.load(place / "vq.safetensors"), data.load("digits", split="test")
    found = model.encode(torch.as_tensor(test.x).float().flatten(1) / 16).numpy()
    _, figures = plot(place, capsys, "codes", *DIGITS, runs=("vq",))
    assert figures["codes in use"] == len(np.unique(found)) > 1
    named = sum(np.bincount(test.labels[found == code]).max() for code in np.unique(found))
    assert figures["purity"] == pytest.approx(named / len(test), rel=1e-3)
    share = np.bincount(found) / len(found)
    share = share[share > 0]
    assert figures["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)


def test_figures_of_the_kl_are_those_of_eval(place, capsys):
    result = evaluate.evaluate(models.load(place / "vae.safetensors"), data.load("digits", split="test"))
    _, figures = plot(place, capsys, "kl", *DIGITS, runs=("vae",))
    assert figures["kl, vae"] == pytest.approx(sum(result["kl_dim"]), rel=1e-3)
    assert figures["active, vae"] == result["active_units"] > 0


def test_noise_is_an_anomaly_and_digits_are_not(place, capsys):
    root = ("--root", str(place / "noise"))
    _, noise = plot(place, capsys, "anomaly", *DIGITS, "--outliers", "images", *root, runs=("vae",))
    _, digits = plot(place, capsys, "anomaly", *DIGITS, "--outliers", "digits", runs=("vae",))
    assert noise["auroc, vae"] > 0.9 and digits["auroc, vae"] == 0.5


def test_a_direction_adds_its_attribute(place, capsys):
    _, figures = plot(place, capsys, "directions", *CELEBA, "--root", str(place), runs=("face",))
    assert figures["Eyeglasses: accuracy of a probe"] > figures["Eyeglasses: majority"] + 0.2
    assert figures["Eyeglasses: probability after"] > figures["Eyeglasses: probability before"] + 0.3


def test_other_figures(place, capsys):
    _, found = plot(place, capsys, "losses", runs=("run", "other"))
    assert found == {"last loss, run": 11.25, "last recon, run": 10, "last kl, run": 1.25,
                     "last loss, other": 14.62, "last recon, other": 10, "last kl, other": 1.625}  # fmt: skip
    _, found = plot(place, capsys, "interpolation", *DIGITS, "--steps", "5", runs=("ae2",))
    assert 1 < found["largest step, ae2"] < 4
    _, found = plot(place, capsys, "pca", *DIGITS, runs=("ae2",))
    assert found["share of the variance, ae2"] == pytest.approx(1, abs=1e-3)
    _, found = plot(place, capsys, "holes", *DIGITS, "--samples", "50", runs=("vae",))
    assert found["accuracy of the classifier"] > 0.8 and 0.1 < found["mean confidence, vae"] < 1


# ---- drawing


def test_maps_have_y_upwards_and_x_to_the_right(tmp_path):
    images = np.zeros((3, 4, 8, 8))
    images[2, 0] = 1  # the largest y, the least x
    at = plots.Map(images, np.arange(4.0), np.arange(3.0))
    plots.image_maps(tmp_path / "map.png", "Map", {"": at}, ("x", "y"))
    pixels = image.imread(tmp_path / "map.png")[..., 0]
    below = pixels[len(pixels) // 5 :]  # the title
    rows, columns = np.nonzero(below == 0)
    assert rows.mean() < 0.4 * len(below) and columns.mean() < 0.4 * pixels.shape[1]


@pytest.mark.parametrize(
    ("levels", "scale"),
    [((0.08, 29.0), "log"), ((1.0, 49.0), "linear"), ((29.0,), "linear"), ((-0.08, 29.0), "linear")],
)
def test_curves_of_unlike_levels_have_a_logarithmic_axis(tmp_path, monkeypatch, levels, scale):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    step = np.array([1.0, 2.0])
    lines = {str(level): (step, np.array([1.1 * level, 0.9 * level])) for level in levels}
    plots.curves(tmp_path / "c.png", "Curves", {"loss": lines}, "step")
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale
    assert all(tick == round(tick) for tick in axes.get_xticks())  # there is no step 1.25


def test_formats_and_a_machine_without_a_screen(place, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    with mpl.rc_context({"backend": "tkagg"}):  # which needs one
        for kind, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
            assert (
                cli.main(
                    ["plot", "codebook", str(place / "vq.safetensors"), "--out", str(place / f"c.{kind}")]
                )
                == 0
            )
            assert (place / f"c.{kind}").read_bytes().startswith(start)
    monkeypatch.chdir(place)
    assert cli.main(["plot", "codebook", "vq.safetensors"]) == 0 and (place / "codebook.png").exists()


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "p.png"
    plots.image_grid(path, "Grid", np.zeros((3, 4, 4)), 2)
    before = path.read_bytes()

    def full(figure, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", full)
    with pytest.raises(OSError, match=r"p\.png could not be written: No space left"):
        plots.image_grid(path, "Grid", np.ones((3, 4, 4)), 2)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


# ---- bad input


@pytest.mark.parametrize(
    ("kind", "runs", "arguments", "message"),
    [
        ("latnet", ("vae",), (), "KIND 'latnet' is unknown: did you mean 'latent'"),
        ("latent", ("vae",), DIGITS, "latent needs a 2-D latent, .* vae has 6 dimensions: use pca or tsne"),
        ("manifold", ("vae",), DIGITS, "manifold needs a 2-D latent, that of vae has 6 dimensions"),
        ("latent", ("vae2",), (), r"vae2\.safetensors does not say what it was trained on: give --data"),
        ("pca", ("vq",), DIGITS, r"pca needs a continuous latent, and vq \(workshop-vq\) has none"),
        ("tsne", ("ddpm",), DIGITS, r"tsne needs a continuous latent, and ddpm \(ddpm-tiny\) has none"),
        ("manifold", ("cvae",), DIGITS, r"decodes codes without labels, and cvae \(cvae\) takes them"),
        ("kl", ("ae2",), DIGITS, r"kl needs a VAE, and ae2 \(ae-mlp\) has no KL"),
        ("codebook", ("vae",), (), r"codebook needs a model with a codebook, and vae \(vae-mlp\) has none"),
        ("codebook", ("convvq",), (), r"codebook needs a model of one code an image .* has 2x2"),
        ("denoising", ("vae",), (), r"denoising needs a diffusion model, and vae \(vae-mlp\) is none"),
        ("samples", ("ae2",), (), "MLPAutoencoder does not sample"),
        ("samples", ("prior",), (), r"samples of prior \(code-prior\) are codes: give the --decoder of them"),
        ("samples", ("prior",), ("--decoder", "vae"), r"with a codebook, and vae \(vae-mlp\) has none"),
        ("samples", ("vae",), ("--decoder", "vq"), r"MLPVAE has no codes, vq \(workshop-vq\) has 12"),
        ("samples", ("points",), (), r"samples of shape \[2\] are no images"),
        ("reconstructions", ("prior",), DIGITS, r"prior \(code-prior\) does not reconstruct"),
        ("reconstructions", ("face",), DIGITS, r"the model takes samples of \(3, 16, 16\), those of digits"),
        ("losses", ("vae",), (), r"losses needs the log of a run, and there is no log\.jsonl with"),
        ("losses", ("run", "run"), (), "a RUN is given twice"),
        ("codes", ("vq",), ("--data", "images", "noise"), "codes needs labels, and images has none"),
        ("holes", ("vae2",), ("--data", "images", "noise"), "holes needs labels, and images has none"),
        ("plane", ("vae",), DIGITS, "digits has no attributes here"),
        ("directions", ("vae",), DIGITS, "digits has no attributes here"),
        ("pca", ("face",), (*CELEBA, "--attribute", "Smilin"), "'Smilin' is unknown: .* 'Smiling'"),
        ("plane", ("face",), (*CELEBA, "--up", "Eyeglass"), "'Eyeglass' is unknown: .* 'Eyeglasses'"),
        ("directions", ("face",), (*CELEBA, "--recipe", "Smile"), "'Smile' is unknown: .* 'Smiling'"),
        ("directions", ("face",), (*CELEBA, "--recipe", "Bald"), "at least 10 samples .* got 3 and 93"),
        ("interpolation", ("vae",), (*DIGITS, "--method", "cubic"), "method must be one of .* got 'cubic'"),
        ("codebook", ("vq",), ("--out", "p.jpg"), r"must end in \.png, \.pdf, \.svg, got"),
        ("codebook", ("none",), (), "there is no checkpoint"),
    ],
)  # fmt: skip
def test_what_is_missing(place, capsys, kind, runs, arguments, message):
    arguments = [*arguments]
    if "noise" in arguments:
        arguments[arguments.index("noise") :] = ["--root", str(place / "noise")]
    elif "--data" in arguments:
        arguments += ["--root", str(place)]
    elif "--decoder" in arguments:
        arguments[-1] = str(place / f"{arguments[-1]}.safetensors")
    out = arguments.pop() if "--out" in arguments else "missing.png"
    printed = plot(place, capsys, kind, *[a for a in arguments if a != "--out"], runs=runs, out=out, code=2)
    assert re.search(message, printed), printed
    assert not (place / "missing.png").exists()


def test_the_command_line_explains_itself(capsys):
    for arguments, text in ((["--help"], "denoising"), (["plane", "--help"], "--across"),
                            (["kl", "--help"], "(default: 5000)")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(["plot", *arguments])
        assert stop.value.code == 0 and text in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["plot", "kl", "run", "--side", "3"])  # another kind's option
    assert stop.value.code == 2
