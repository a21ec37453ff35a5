"""Images that are decoded into a cache: CelebA's layout, folders of images, and the VAE of faces on them."""

import io
import json
import logging
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")
matplotlib_image = pytest.importorskip("matplotlib.image")
Image = pytest.importorskip("PIL.Image")

from bench import loader  # noqa: E402
from vaeops import cli  # noqa: E402
from vaeops.train import data, workshop_celeba  # noqa: E402
from vaeops.train.data import cache  # noqa: E402
from vaeops.train.data.cache import FOLDER  # noqa: E402

ROOT = Path(os.environ.get("VAEOPS_DATA", "data"))
NAMES = ("Smiling", "Eyeglasses", *(f"Attribute_{i}" for i in range(38)))
ORIGINAL = (178, 218)


def encoded(size, seed, kind="JPEG", mode="RGB", **options):
    """A smooth drawn picture; JPEG keeps it well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).convert(mode)
    buffer = io.BytesIO()
    small.save(buffer, kind, **options)
    return buffer.getvalue()


def celeba_files(sizes, codes=None):
    """CelebA's layout: an image of each (width, height); codes: 0, 1 or 2, the last one 1 unless given."""
    codes = codes or [0] * (len(sizes) - 1) + [1]
    files = {f"img_align_celeba/{i:06d}.jpg": encoded(size, i) for i, size in enumerate(sizes)}
    files["list_eval_partition.txt"] = "".join(f"{i:06d}.jpg {c}\n" for i, c in enumerate(codes)).encode()
    rows = [f"{i:06d}.jpg " + "  ".join("1" if (i + k) % 3 == 0 else "-1" for k in range(40))
            for i in range(len(sizes))]  # fmt: skip
    files["list_attr_celeba.txt"] = "\n".join([str(len(sizes)), " ".join(NAMES) + " ", *rows, ""]).encode()
    return files


def write(files, path):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_tar(files, path, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./celeba/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(files, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def expected(content, size):
    """The face as the tutorials prepare it: the middle 148x148, resampled to size x size by Lanczos."""
    with Image.open(io.BytesIO(content)) as face:
        square = face.crop((15, 35, 163, 183)) if face.size == ORIGINAL else face
        return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


# ---- CelebA


def backwards(files):
    return dict(reversed(files.items()))


@pytest.mark.parametrize("layout", ["folder", "official", "zip", "tar", "tar.gz"])
def test_celeba_in_every_layout(tmp_path, layout):
    files = celeba_files([ORIGINAL] * 5, [0, 2, 0, 1, 0])
    if layout == "folder":
        source = write(files, tmp_path / "celeba")
        write({"img_celeba/000000.jpg": encoded((400, 300), 9)}, source)  # uncropped, of the same name
    elif layout == "official":
        source = tmp_path / "celeba"
        faces = {name: files.pop(name) for name in list(files) if name.endswith(".jpg")}
        write({f"Anno/{name}": content for name, content in files.items()}, source)
        write_zip(faces, source / "img_align_celeba.zip")
        files |= faces
    elif layout == "zip":
        source = write_zip(backwards(files), tmp_path / "celeba.zip")
    else:
        source = write_tar(backwards(files), tmp_path / f"celeba.{layout}", "w:gz" if "gz" in layout else "w")
    root = source if layout == "tar.gz" else tmp_path
    found = data.load("celeba", root, size=24)
    assert found.x.shape == (3, 3, 24, 24) and found.x.dtype == np.uint8 and found.labels is None
    assert found.extra["files"] == ("000000.jpg", "000002.jpg", "000004.jpg")
    for row, i in enumerate((0, 2, 4)):
        assert np.array_equal(found.x[row], expected(files[f"img_align_celeba/{i:06d}.jpg"], 24))
    assert found.attributes.shape == (3, 40) and found.attributes.dtype == bool
    assert found.attribute("Smiling").tolist() == [True, False, False]
    assert found.attribute("Eyeglasses").tolist() == [False, True, False]
    assert len(data.load("celeba", root, split="test")) == 1
    assert len(data.load("celeba", root, split="train+valid", size=8)) == 4
    stored = (source if source.is_dir() else tmp_path) / FOLDER
    assert len(list(stored.glob("*.npy"))) == len(list(stored.iterdir())) / 2 == 3


def test_celeba_s_sizes(tmp_path):
    files = celeba_files([(20, 20)] * 3)
    source = write(files, tmp_path)
    as_is = data.load("celeba", source).x
    with Image.open(io.BytesIO(files["img_align_celeba/000001.jpg"])) as face:
        assert np.array_equal(as_is[1], np.asarray(face).transpose(2, 0, 1))
    assert np.array_equal(data.load("celeba", source, size=20).x, as_is)
    smaller = data.load("celeba", source, size=10).x
    assert np.array_equal(smaller[0], expected(files["img_align_celeba/000000.jpg"], 10))


def test_celeba_without_attributes(tmp_path):
    files = celeba_files([(6, 6)] * 3)
    del files["list_attr_celeba.txt"]
    found = data.load("celeba", write(files, tmp_path))
    assert found.attributes is None
    with pytest.raises(ValueError, match="celeba has no attributes here"):
        found.attribute("Smiling")


def test_celeba_says_what_is_missing_or_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"celeba: there is no folder or archive .*\.tar"):
        data.load("celeba", tmp_path / "celeba.tar")
    with pytest.raises(
        FileNotFoundError, match=r"no list_eval_partition\.txt in .* nor is there .*celeba\.zip"
    ):
        data.load("celeba", tmp_path)
    (tmp_path / "celeba.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"celeba\.tar is neither a folder nor a \.zip nor a \.tar"):
        data.load("celeba", tmp_path)
    (tmp_path / "celeba.tar").unlink()
    files = celeba_files([(6, 6), (4, 4), (4, 4)])
    write(files, tmp_path)
    with pytest.raises(ValueError, match=r"must have one size.*000000\.jpg is 6x6, .*000001\.jpg is 4x4"):
        data.load("celeba", tmp_path)
    with pytest.raises(ValueError, match="no image of the split 'test'"):
        data.load("celeba", tmp_path, split="test")
    with pytest.raises(ValueError, match="attribute 'Eye_glasses' is unknown: did you mean 'Eyeglasses'"):
        data.load("celeba", tmp_path, size=4).attribute("Eye_glasses")
    attributes, face = files["list_attr_celeba.txt"], "img_align_celeba/000001.jpg"
    for name, content, message in (
        (face, encoded((6, 4), 0), rf"^celeba: .*broken: {face} is 6x4; 178x218 or square"),
        (face, b"text", rf"^celeba: .*broken: {face} is no image"),
        (face, encoded((40, 40), 0)[:-200], rf"^celeba: .*broken: {face} is damaged: .*truncated"),
        ("list_eval_partition.txt", b"000000.jpg 3", r"partition\.txt, line 1: a file and 0, 1 or 2"),
        ("list_attr_celeba.txt", b"3\nSmiling\n", "line 2: 40 names are expected, got 1"),
        ("list_attr_celeba.txt", attributes.replace(b"-1", b"0", 1), "line 3: a file and 40"),
        ("list_attr_celeba.txt", b"\n".join(attributes.splitlines()[:3]),
         r"has no line of 000001\.jpg, and of 0 more"),
    ):  # fmt: skip
        folder = tmp_path / "broken"
        write(files | {name: content}, folder)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.load("celeba", folder, size=8)
        assert not list(folder.glob(f"{FOLDER}/*"))  # nothing half done is left
        shutil.rmtree(folder)
    (tmp_path / "img_align_celeba/000000.jpg").unlink()
    (tmp_path / "img_align_celeba/000001.jpg").unlink()
    message = r"has no img_align_celeba/000000\.jpg, and 1 more of the 2 images of the split 'train' are"
    with pytest.raises(FileNotFoundError, match=message):
        data.load("celeba", tmp_path)


def test_damaged_archives(tmp_path):
    files = celeba_files([(8, 8)] * 3)
    whole = write_tar(files, tmp_path / "celeba.tar").read_bytes()
    inside = whole.rindex(b"img_align_celeba/000002.jpg")
    (tmp_path / "celeba.tar").write_bytes(whole[: inside + 700])
    with pytest.raises(ValueError, match=r"celeba: .*celeba\.tar is damaged: unexpected end of data"):
        data.load("celeba", tmp_path / "celeba.tar", split="valid")
    whole = write_zip(files, tmp_path / "celeba.zip").read_bytes()
    inside = whole.index(files["img_align_celeba/000001.jpg"])
    (tmp_path / "celeba.zip").write_bytes(whole[:inside] + b"?" + whole[inside + 1 :])
    with pytest.raises(ValueError, match=r"celeba\.zip is damaged: Bad CRC.*000001\.jpg"):
        data.load("celeba", tmp_path / "celeba.zip")
    (tmp_path / "celeba.zip").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"neither a folder nor a \.zip nor a \.tar, or it is incomplete"):
        data.load("celeba", tmp_path / "celeba.zip")


# ---- any folder


def test_images_of_sub_folders(tmp_path):
    for i in range(20):
        write({f"{'cat' if i % 2 else 'dog'}/deep/{i:02d}.PNG": encoded((9, 7), i, "PNG")}, tmp_path)
    write({"cat/notes.txt": b"", ".trash/x.png": b"", "cat/.hidden.png": b""}, tmp_path)
    parts = {split: data.load("images", tmp_path, split=split) for split in ("train", "valid", "test")}
    assert [part.x.shape for part in parts.values()] == [(16, 3, 7, 9), (2, 3, 7, 9), (2, 3, 7, 9)]
    files = [file for part in parts.values() for file in part.extra["files"]]
    assert len(set(files)) == 20
    for part in parts.values():
        assert part.label_names == ("cat", "dog") and part.labels.dtype == np.int64
        for pixels, label, file in zip(part.x, part.labels, part.extra["files"]):
            assert file.startswith(part.label_names[label])
            with Image.open(tmp_path / file) as picture:
                assert np.array_equal(pixels, np.asarray(picture).transpose(2, 0, 1))
    train = parts["train"]
    assert list(train.extra["files"]) == sorted(train.extra["files"])
    assert data.load("images", tmp_path, seed=1).extra["files"] != train.extra["files"]


def test_images_are_cut_square_upright_and_grey_where_all_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for i in range(10):
        write({f"{i}.jpg": encoded((20, 12), i, mode="L", **({"exif": exif} if i == 3 else {}))}, tmp_path)
    found = data.load("images", tmp_path, split="train+valid", size=6)
    assert found.x.shape == (9, 1, 6, 6) and found.labels is None
    for pixels, file in zip(found.x, found.extra["files"]):
        with Image.open(tmp_path / file) as picture:
            box = (4, 0, 16, 12)
            if file == "3.jpg":
                picture, box = picture.transpose(Image.Transpose.ROTATE_270), (0, 4, 12, 16)
            square = picture.crop(box).resize((6, 6), Image.Resampling.LANCZOS)
            assert np.array_equal(pixels[0], np.asarray(square)), file
    write({"colour.png": encoded((20, 12), 0, "PNG", "P")}, tmp_path)
    assert data.load("images", tmp_path, size=6).x.shape == (9, 3, 6, 6)


def test_images_refuse(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images: there is no folder or archive .*nowhere"):
        data.load("images", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no image: \.bmp, "):
        data.load("images", tmp_path)
    write({"one.png": encoded((8, 8), 0, "PNG")}, tmp_path)
    with pytest.raises(ValueError, match="no image of the split 'valid': it has 1 in all"):
        data.load("images", tmp_path, split="valid")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "two.png")
    with pytest.raises(ValueError, match=r"two\.png has more than 8 bits a channel"):
        data.load("images", tmp_path)


# ---- the cache


@pytest.fixture
def faces(tmp_path):
    return write(celeba_files([(8, 8)] * 5), tmp_path / "celeba")


@pytest.fixture
def decodings(monkeypatch):
    """How many images were decoded."""
    decode, seen = cache.decode, []
    monkeypatch.setattr(cache, "decode", lambda chunk, *rest: seen.extend(chunk) or decode(chunk, *rest))
    return seen


def test_a_cache_is_filled_once(faces, tmp_path, decodings, capfd):
    store = tmp_path / "store"
    first = data.load("celeba", faces, cache=store)
    assert len(decodings) == 4 and "decoding celeba, train" in capfd.readouterr().err
    again = data.load("celeba", faces, cache=store)
    assert len(decodings) == 4 and np.array_equal(again.x, first.x) and not (faces / FOLDER).exists()
    assert not again.x.flags.owndata and not again.x.flags.writeable  # mapped
    record = json.loads(next(store.glob("*.json")).read_text())
    assert record["source"] == str(faces) and record["part"] == "train"
    x, _ = again.batch(torch.tensor([3, 0]))
    assert np.array_equal(x, first.x[[3, 0]])
    for options, more in (({"size": 4}, 4), ({"split": "valid"}, 1), ({"size": 4}, 0)):
        before = len(decodings)
        data.load("celeba", faces, cache=store, **options)
        assert len(decodings) == before + more


def test_a_stale_or_damaged_cache_is_made_anew(faces, decodings, caplog):
    x = np.array(data.load("celeba", faces).x)
    (array,) = (faces / FOLDER).glob("*.npy")
    whole, record = array.read_bytes(), array.with_suffix(".json").read_bytes()

    def shorten():
        array.write_bytes(whole[:-1])

    def overwrite():
        array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    def cut_record():
        array.with_suffix(".json").write_bytes(record[:-9])

    def lose_record():
        array.with_suffix(".json").unlink()

    for damage in (shorten, overwrite, cut_record, lose_record):
        decodings.clear()
        caplog.clear()
        damage()
        with caplog.at_level(logging.WARNING, "vaeops"):
            assert np.array_equal(data.load("celeba", faces).x, x)
        assert len(decodings) == 4 and "it is made anew" in caplog.text
    changed = faces / "img_align_celeba/000002.jpg"
    changed.write_bytes(encoded((8, 8), 77))
    found = data.load("celeba", faces).x
    assert np.array_equal(found[[0, 1, 3]], x[[0, 1, 3]]) and not np.array_equal(found[2], x[2])
    assert len(list((faces / FOLDER).iterdir())) == 2


def test_a_cache_that_cannot_be_written(faces):
    (faces / FOLDER).write_text("a file where the folder should be")
    message = r"could not be written: .*cache= or --cache names another folder"
    with pytest.raises(FileExistsError, match=message):
        data.load("celeba", faces)


def test_an_interrupted_decoding_leaves_the_old_cache(faces, monkeypatch):
    x = np.array(data.load("celeba", faces).x)
    kept = sorted((faces / FOLDER).iterdir())
    os.utime(faces / "img_align_celeba/000000.jpg", ns=(1, 1))

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load("celeba", faces)
    assert sorted((faces / FOLDER).iterdir()) == kept
    assert np.array_equal(data.load("celeba", faces).x, x)


def test_the_benchmark_of_the_cache(tmp_path, capsys):
    source = write_tar(celeba_files([ORIGINAL] * 5), tmp_path / "celeba.tar")
    loader.main([str(source), "--rounds", "1", "--seconds", "0.01", "--batch", "2"])
    printed = capsys.readouterr().out
    assert re.search(
        r"celeba\.tar: 4 training images .*\n +decode.* images/s .*\n +gather.* images/s .*x\n", printed
    )
    assert not (tmp_path / FOLDER).exists()


# ---- real faces


@pytest.mark.skipif(not (ROOT / "celeba_178x218_300.tar").exists(),
                    reason=f"no celeba_178x218_300.tar in {ROOT}: set VAEOPS_DATA")  # fmt: skip
def test_real_originals(tmp_path):
    found = data.load("celeba", ROOT / "celeba_178x218_300.tar", size=64, cache=tmp_path)
    assert found.x.shape == (300, 3, 64, 64) and 0.2 < found.attribute("Smiling").mean() < 0.8
    with tarfile.open(ROOT / "celeba_178x218_300.tar") as archive:
        last = archive.extractfile(f"celeba/img_align_celeba/{found.extra['files'][-1]}").read()
    assert np.array_equal(found.x[-1], expected(last, 64))


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "celeba_64.tar").exists(),
                    reason=f"no celeba_64.tar in {ROOT}: set VAEOPS_DATA")  # fmt: skip
def test_real_faces(tmp_path, monkeypatch):
    """In one process and in several, the same bytes."""
    load = [data.load("celeba", ROOT / "celeba_64.tar", split=split, cache=tmp_path)
            for split in ("train", "valid", "test")]  # fmt: skip
    assert [len(part) for part in load] == [4829, 599, 572]
    counts = {name: sum(int(part.attribute(name).sum()) for part in load)
              for name in ("Smiling", "Eyeglasses", "Male", "Young")}  # fmt: skip
    assert counts == {"Smiling": 2934, "Eyeglasses": 398, "Male": 2632, "Young": 4484}
    monkeypatch.setattr(cache, "_PROCESSES_FROM", 0)
    again = data.load("celeba", ROOT / "celeba_64.tar", cache=tmp_path / "processes")
    assert np.array_equal(again.x, load[0].x)


@pytest.mark.slow
def test_processes_name_a_damaged_image(faces, monkeypatch):
    monkeypatch.setattr(cache, "_PROCESSES_FROM", 0)
    (faces / "img_align_celeba/000001.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"000001\.jpg is no image"):
        data.load("celeba", faces)
    assert not list((faces / FOLDER).iterdir())


# ---- the experiment


@pytest.mark.slow
def test_train_command_on_faces(tmp_path, capsys):
    write(celeba_files([(64, 64)] * 8), tmp_path)
    options = ["--steps", str(workshop_celeba.TAIL), "--batch", "2", "--lr", "1e-5", "--out", str(tmp_path)]
    assert cli.main(["experiment", "workshop-celeba", "--data", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    for arm in workshop_celeba.ARMS:
        assert re.search(rf"^{arm} +loss +\d+\.\d+ -> +\d+\.\d+ +\d+\.\d images/s", printed, re.M)
    first = re.search(r"first 10 losses within (\S+),", printed)
    assert first is not None and float(first[1]) < 1e-3
    assert matplotlib_image.imread(tmp_path / workshop_celeba.PICTURE)[..., :3].std() > 0.05


def test_train_command_refuses(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["experiment", "workshop-celeba", "--data", str(tmp_path / "celeba.tar")])
    assert "there is no" in capsys.readouterr().err
    write(celeba_files([(6, 4)] * 3), tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["experiment", "workshop-celeba", "--data", str(tmp_path)])
    assert "000000.jpg is 6x4; 178x218 or square images are taken" in capsys.readouterr().err
