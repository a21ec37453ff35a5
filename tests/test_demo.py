"""The demonstration end to end, tiny: it prints its tables and every picture shows something."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
image = pytest.importorskip("matplotlib.image")

from vaeops.train import demo  # noqa: E402


def test_demo_prints_tables_and_writes_pictures(tmp_path, monkeypatch, capsys):
    cases = (("reparam_kl", (128, 20)), ("gaussian_kl", (64, 64)), ("gaussian_log_prob", (4, 2, 3, 3)))
    monkeypatch.setattr(demo, "CASES", cases)
    monkeypatch.setattr(demo, "serving", lambda device: "cpp")
    demo.main(["--out", str(tmp_path), "--epochs", "2", "--rounds", "1"])
    printed = capsys.readouterr().out
    for text in (
        "first step, recon",
        "last epoch, kl",
        "images/s",
        "reparam_kl 128×20",
        "gaussian_log_prob 4×2×3×3",
        "eager ms",
    ):
        assert text in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(demo.PICTURES)
    for name in demo.PICTURES:
        path = tmp_path / name
        pixels = image.imread(path)[..., :3]
        assert path.stat().st_size > 5_000, name
        assert pixels.std() > 0.05 and (pixels < 0.9).mean() > 0.01, name


def test_training_follows_from_the_seed():
    images, labels = demo.digits(3)
    assert images.shape == (1797, 8, 8) and set(labels.tolist()) == set(range(10))
    assert images.min() == 0 and images.max() == 1
    runs = [demo.train("", images[:256].flatten(1), 2, seed, latent=2, ops="fused") for seed in (3, 3, 4)]
    assert (runs[0].recon == runs[1].recon).all() and (runs[0].kl == runs[1].kl).all()
    assert (runs[0].recon != runs[2].recon).any()
    assert runs[0].recon[-1] < runs[0].recon[0]
