"""Data sets in their makers' formats, whole and damaged; augmentation against torchvision's."""
import gzip
import pickle
import re
import shutil
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets as tv
from PIL import Image
from torchvision.transforms.v2 import functional as T

from conftest import FOLDER, NARROW, assert_one_line
from lab.config import make_config
from lab.data import augmented, load_data, read_data, shuffle, views

# ------------------------------------------------------------------------------------------------
# Data sets in their own formats, whole and damaged
# ------------------------------------------------------------------------------------------------

COUNTS = {"train": 24, "test": 9}
TENSORS = ("mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def md5(path):
    import hashlib
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(root, name, truth):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, split in (("train", "train"), ("t10k", "test")):
        images, labels = truth[split]
        for kind, code, array in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
            head = bytes([0, 0, 8, code]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = head + array.astype(np.uint8).tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)
            (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def write_cifar(root, dataset, truth, monkeypatch):
    cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[dataset]
    folder, key = root / cls.base_folder, "labels" if dataset == "cifar10" else "fine_labels"
    folder.mkdir(parents=True)
    names = {"train": [f for f, _ in cls.train_list], "test": [f for f, _ in cls.test_list]}
    for split, files in names.items():
        images, labels = truth[split]
        for file, x, y in zip(files, np.array_split(images, len(files)),
                              np.array_split(labels, len(files)), strict=True):
            batch = {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), key: y.tolist()}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    classes = [f"class {k}" for k in range(10 if dataset == "cifar10" else 100)]
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: classes}, protocol=2))
    for split, files in names.items():                    # ours in place of the true checksums
        monkeypatch.setattr(cls, f"{split}_list", [[f, md5(folder / f)] for f in files])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})


def write_svhn(root, truth, monkeypatch):
    from scipy.io import savemat
    root.mkdir(parents=True)
    lists = {}
    for split, (images, labels) in truth.items():
        file = root / f"{split}_32x32.mat"
        savemat(file, {"X": images.transpose(1, 2, 3, 0),
                       "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)})
        lists[split] = ["no address", file.name, md5(file)]
    monkeypatch.setattr(tv.SVHN, "split_list", lists)


@pytest.fixture(params=TENSORS)
def on_disk(request, tmp_path, monkeypatch, no_network):
    """A data set's files as its makers write them -> its name, what they hold."""
    name, random = request.param, np.random.default_rng(0)
    side = (28, 28) if "mnist" in name else (32, 32, 3)
    truth = {split: (random.integers(0, 256, (n, *side), dtype=np.uint8),
                     np.arange(n) % 10) for split, n in COUNTS.items()}
    if "mnist" in name:
        write_idx(tmp_path / "own", {"mnist": "MNIST"}.get(name, "FashionMNIST"), truth)
    elif "cifar" in name:
        write_cifar(tmp_path / "own", name, truth, monkeypatch)
    else:
        write_svhn(tmp_path / "own", truth, monkeypatch)
    return name, truth


def load(**fields):
    return load_data(make_config(**fields), torch.device("cpu"))


def test_a_data_set_is_read_as_written(on_disk, cli):
    name, truth = on_disk
    data = load(dataset=name, data_path="own")
    assert len(data.classes) == (100 if name == "cifar100" else 10)
    for split, part in (("train", data.train), ("test", data.test)):
        images = torch.tensor(truth[split][0])
        images = F.pad(images[:, None], [2] * 4) if images.dim() == 3 \
            else images.permute(0, 3, 1, 2)
        assert torch.equal(part.images, images)
        assert part.labels.tolist() == truth[split][1].tolist()
    x = data.train.images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(data.mean, x.mean(1).float())
    torch.testing.assert_close(data.std, x.std(1, correction=0).float(), rtol=1e-3, atol=1e-4)
    done = cli(f"--dataset {name} --data-path own --epochs 1", NARROW, "--batch-size 8")
    assert done.code == 0 and f"{name}: 24 + 9 images" in done.out, done


def test_a_damaged_data_set_is_one_line(on_disk, cli):
    name, _ = on_disk
    files = [f for f in sorted(Path("own").rglob("*")) if f.is_file() and "meta" not in f.name]
    victim = next(f for f in files if re.search("train.*images|data_batch_3|train", f.name))
    victim.write_bytes(victim.read_bytes()[:-100])
    read_data.cache_clear()
    done = cli(f"--dataset {name} --data-path own --epochs 0", NARROW)
    assert done.code == 2, done
    last = done.err.strip().splitlines()[-1]
    assert name in last and "put a fresh copy of" in last and "own" in last, done
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name, file", [
    ("mnist", "ubyte.gz"), ("fashion-mnist", "ubyte.gz"), ("svhn", "train_32x32.mat"),
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_offline_the_message_says_which_file_to_put_where(name, file, cli, no_network):
    done = cli(f"--dataset {name} --data-path nowhere", NARROW)
    assert done.code == 2 and file in done.err.splitlines()[-1] and "nowhere" in done.err


def test_a_folder_of_images_of_every_kind(cli):
    """Grey, palette, palette with transparency, RGBA, 16 bits, 1 bit, CMYK, rotated by EXIF."""
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    grey = Image.fromarray(ramp)
    palette = grey.convert("RGB").quantize(32)
    rgba = grey.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 3                                      # upside down
    kinds = {"grey.png": grey, "palette.png": palette, "rgba.png": rgba, "la.png":
             grey.convert("LA"), "cmyk.tif": grey.convert("CMYK"),
             "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257)}
    for split in ("train", "test"):
        folder = Path("own") / split / "ramp"
        folder.mkdir(parents=True)
        for name, image in kinds.items():
            image.save(folder / name)
        grey.rotate(180).save(folder / "turned.png", exif=exif)
        palette.save(folder / "clear.gif", transparency=0)
        grey.convert("1").save(folder / "bits.png")
        grey.resize((64, 48)).save(folder / "wide.jpg")
    data = load(dataset="folder", data_path="own", model="encapnet-small")
    names = sorted(p.name for p in Path("own/train/ramp").iterdir())
    pixels = dict(zip(names, data.train.images.int(), strict=True))
    assert data.train.images.shape == (10, 3, 32, 32)
    for name in (*kinds, "turned.png"):
        assert (pixels[name] - torch.tensor(ramp).int()).abs().max() <= 4, name
    assert set(pixels["bits.png"].unique().tolist()) == {0, 255}
    done = cli("--dataset folder --data-path own --epochs 1", NARROW, "--batch-size 5")
    assert done.code == 0 and "own: 10 + 10 images" in done.out


@pytest.fixture
def copy(place, pictures):
    return Path(shutil.copytree(pictures, place / "copy"))


COPY = FOLDER.replace("--train-images 32 --test-images 10", "") + " --data-path copy"


def test_unreadable_images_stop_or_are_skipped_with_a_report(copy, cli):
    (copy / "train/ant/3.png").write_bytes(b"no image")
    (copy / "train/bee/4.png").write_bytes((copy / "train/bee/4.png").read_bytes()[:300])
    done = cli(COPY)
    assert_one_line(done, "2 of 36 images", "train/ant/3.png", "train/bee/4.png", "skip")
    done = cli(COPY, "--unreadable skip")
    assert done.code == 0 and "skipped: 2 of 36 images" in done.out
    assert "copy: 34 + 15 images" in done.out


def test_folder_layouts_that_cannot_work(copy, cli):
    (copy / "test/dog").mkdir()
    shutil.copy(copy / "test/ant/0.png", copy / "test/dog")
    assert_one_line(cli(COPY), "test has classes that training has not: dog")
    shutil.rmtree(copy / "test/dog")
    for path in (copy / "train/cat").iterdir():
        path.unlink()
    assert_one_line(cli(COPY), "no images in cat")
    shutil.rmtree(copy / "train")
    assert_one_line(cli(COPY), "copy/train", "train/CLASS/*.jpg")
    (copy / "train").mkdir()
    assert_one_line(cli(COPY), "no class folders")
    assert_one_line(cli(FOLDER, "--data-path nowhere"), "nowhere/train")
    assert_one_line(cli(FOLDER.replace("32", "99")), "--train-images 99", "only 36")


def imagenet_tree(root, boxes=True):
    random = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(n):
                file = folder / f"{name}_{split}_{k}.JPEG"
                Image.fromarray(random.integers(0, 60, (80, 100, 3), dtype=np.uint8)).save(file)
    image = np.zeros((80, 100, 3), np.uint8)
    image[20:60, 10:50] = 255                             # the object, in its box
    Image.fromarray(image).save(root / "train/n02/n02_train_0.JPEG", quality=95)
    notes = root / "Annotations/n02"
    notes.mkdir(parents=True)
    box = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>" \
        "</object>"
    (notes / "n02_train_0.xml").write_text(
        f"<annotation>{box.format(15, 25, 45, 55)}{box.format(60, 20, 90, 50)}</annotation>")


H_IMAGENET = f"--dataset h-imagenet --data-path own --image-size 32 --epochs 1 {NARROW} " \
    "--batch-size 4 --class-list list.txt"


def test_h_imagenet_cuts_boxes_caches_and_checks(cli):
    imagenet_tree(Path("own"))
    Path("list.txt").write_text("n02\nn03\n")
    done = cli(H_IMAGENET)
    assert done.code == 0 and "9 train images of 2 classes" in done.out and "255,725" in done.out
    data = load(dataset="h-imagenet", data_path="own", image_size=32, class_list="list.txt")
    bright = data.train.images.float().mean((1, 2, 3))
    assert data.classes == ["n02", "n03"] and data.train.labels.tolist() == 5 * [0] + 4 * [1]
    assert bright[0] > 250 and bright[1] < 5              # the two boxes of the first image
    done = cli(H_IMAGENET, "--seed 1")
    assert done.code == 0 and "decoding" not in done.out  # the cache is used
    for cache in Path("own/h-imagenet-cache").glob("*.bin"):
        content = bytearray(cache.read_bytes())
        content[100] ^= 1
        cache.write_bytes(content)
    read_data.cache_clear()
    assert_one_line(cli(H_IMAGENET, "--seed 2"), "checksum", "delete it")
    Path("list.txt").write_text("n02\nn77\n")
    assert_one_line(cli(H_IMAGENET), "n77")
    (Path("own") / "Annotations/n02/n02_train_0.xml").write_text("<annotation><object>")
    assert_one_line(cli(H_IMAGENET), "n02_train_0.xml is damaged")
    assert_one_line(cli(H_IMAGENET.replace("list.txt", "none.txt")), "none.txt")
    assert_one_line(cli(H_IMAGENET.replace("--class-list list.txt", "")), "--class-list FILE")


def test_imagenet_is_a_tree_too(cli):
    imagenet_tree(Path("own"))
    done = cli(f"--dataset imagenet --data-path own --image-size 32 --epochs 1 {NARROW} "
               "--batch-size 4 --augment ++")
    assert done.code == 0 and "imagenet: 12 + 6 images, 3 classes" in done.out, done


# ------------------------------------------------------------------------------------------------
# Augmentation   [App. C]
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_torchvisions_image_by_image(channels, flip):
    images = torch.randint(256, (40, channels, 34, 34), dtype=torch.uint8)
    images[0] = images[1, :, :1, :1]                      # a uniform image, and a grey one
    images[2] = images[2, :1]
    draws = torch.rand(40, 7)
    draws[3], draws[4] = 0, 1 - 2**-24
    ours = augmented(images, draws, 32, "++", flip)
    plain = augmented(images, draws, 32, "+", flip)
    for image, draw, jittered, cropped in zip(images, draws.tolist(), ours, plain, strict=True):
        x = T.crop(image, int(draw[0] * 3), int(draw[1] * 3), 32, 32)
        x = T.to_dtype(T.horizontal_flip(x) if flip and draw[2] < 0.5 else x, scale=True)
        torch.testing.assert_close(cropped, x)
        brightness, contrast, saturation, hue = (0.2 * (2 * d - 1) for d in draw[3:])
        x = T.adjust_contrast(T.adjust_brightness(x, 1 + brightness), 1 + contrast)
        if channels == 3:
            x = T.adjust_hue(T.adjust_saturation(x, 1 + saturation), hue)
        torch.testing.assert_close(jittered, x, rtol=0, atol=2e-5)
    centre = augmented(images, draws, 32, "none", False)
    torch.testing.assert_close(centre, images[..., 1:33, 1:33] / 255)


def test_draws_depend_on_seed_epoch_and_index_alone():
    order, draws = shuffle(50, 3, 7)
    assert sorted(order.tolist()) == list(range(50)) and draws.min() >= 0 and draws.max() < 1
    torch.manual_seed(1)
    for a, b in zip((order, draws), shuffle(50, 3, 7), strict=True):
        assert torch.equal(a, b)
    for other in (shuffle(50, 3, 8), shuffle(50, 4, 7)):
        assert not torch.equal(other[0], order) and not torch.equal(other[1], draws)


def test_views_of_a_test_image():
    images = torch.arange(36).view(1, 1, 6, 6).byte()
    def corners(*w):
        return [round(float(v[0, 0, 0, 0]) * 255) for v in views(images, 4, *w)]
    assert corners(False, True) == [7]
    assert corners(True, False) == [7, 0, 2, 12, 14]
    assert corners(True, True) == [7, 10, 0, 3, 2, 5, 12, 15, 14, 17]
