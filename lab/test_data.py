"""Data sets are what was written, by every reader; augmentation against torchvision's."""
import gzip
import pickle
import random
import re
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from torchvision.transforms.v2 import functional as T

from conftest import FOLDER, NARROW, assert_one_line
from lab import digits, fit, folders
from lab.config import make_config
from lab.data import (
    Split,
    augmented,
    channel_moments,
    enlarged,
    load_data,
    normalised,
    shuffle,
    views,
)
from lab.folders import annotated_boxes, decode
from lab.runtime import Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Of a run is drawn: it costs a second."""
    monkeypatch.setattr(fit, "draw_run", lambda *run: None)


def load(**fields):
    return load_data(make_config(**fields), CPU)

# ---- Data sets in their own formats, whole and damaged -------------------------------------------

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


def seen(pixels):
    """Images as written, (n, H, W) or (n, H, W, 3), as the model's size has them: (n, C, H, W)."""
    if pixels.ndim == 4:
        return torch.tensor(pixels).permute(0, 3, 1, 2)
    return torch.tensor(np.pad(pixels, ((0, 0), (2, 2), (2, 2))))[:, None]


def test_a_data_set_is_read_as_written(on_disk, cli):
    """28 pixels get a border of 2 of black on every side, colours keep their order."""
    name, truth = on_disk
    found = load(dataset=name, data_path="own")
    assert len(found.classes) == (100 if name == "cifar100" else 10)
    if "cifar" in name:
        assert found.classes[:3] == ["class 0", "class 1", "class 2"]
    for split, part in (("train", found.train), ("test", found.test)):
        assert torch.equal(part.images, seen(truth[split][0]))
        assert part.labels.tolist() == truth[split][1].tolist()
    if name in ("mnist", "cifar100"):                     # one channel, and 100 classes
        done = cli(f"--dataset {name} --data-path own --epochs 1", NARROW, "--batch-size 8")
        assert done.code == 0 and f"{name}: 24 + 9 images" in done.out, done


@pytest.mark.parametrize("on_disk", ["mnist", "svhn"], indirect=True)
@pytest.mark.parametrize("side, augment, stages", [
    (16, "none", [16]),                                   # 28 or 32 to 16
    (32, "+", [32, 34])])                                 # to be cropped: 28 by a border first
def test_another_side_is_resized_with_antialiasing(on_disk, side, augment, stages, cli):
    name, truth = on_disk
    found = load(dataset=name, data_path="own", image_size=side, augment=augment)
    assert found.side == side
    for image, pixels in zip(found.train.images, truth["train"][0], strict=True):
        for stage in stages:
            pixels = np.pad(pixels, 2) if (len(pixels), stage) == (28, 32) else np.asarray(
                Image.fromarray(pixels).resize((stage, stage), Image.Resampling.BILINEAR))
        expected = torch.tensor(pixels)
        expected = expected[None] if expected.dim() == 2 else expected.permute(2, 0, 1)
        assert (image.int() - expected.int()).abs().max() <= 1


def test_a_crop_is_cut_from_the_papers_sizes():
    """34 of 32, 156 of 128, 256 of 224, and in the first ratio otherwise.   [App. C]"""
    assert [enlarged(side) for side in (32, 128, 224, 64)] == [34, 156, 256, 68]


# Channel moments: of every training image that is held, of about 2,000 of a big set


def moments_of(images):
    x = np.asarray(images, float) / 255                   # (n, C, H, W)
    return x.mean((0, 2, 3)), x.std((0, 2, 3))


@pytest.mark.parametrize("odd", [slice(2050, None), slice(1, None, 2), slice(0, 40)])
def test_channel_moments_are_of_all_training_images_that_are_held(odd):
    images = torch.randint(0, 60, (2100, 2, 3, 3), dtype=torch.uint8)
    images[odd, 0] += 180                                 # some are unlike the others
    mean, std = channel_moments(Split(images, torch.zeros(2100)), CPU)
    expected = moments_of(images)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(std, expected[1], rtol=1e-4)


@pytest.mark.parametrize("n, step", [(2000, 1), (2001, 2), (4100, 3)])
def test_channel_moments_of_a_big_set_are_of_images_spread_over_it(n, step):
    images = torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8)
    mean, std = channel_moments(Split(list(images), torch.zeros(n)), CPU)
    expected = moments_of(images[::step])
    np.testing.assert_allclose(mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(std, expected[1], rtol=1e-4)


def test_normalised_training_images_have_mean_0_and_deviation_1_in_each_channel():
    images = torch.randint(0, 256, (50, 3, 4, 4)) // torch.tensor([1, 2, 5]).view(3, 1, 1)
    images[:, 2] = 77                                     # a channel that never changes
    mean, std = channel_moments(Split(images.byte(), torch.zeros(50)), CPU)
    x = normalised(images / 255, SimpleNamespace(mean=mean, std=std)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(x.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(1, correction=0), torch.tensor([1., 1, 0]), atol=1e-3, rtol=0)
    assert std[2] == pytest.approx(1e-3)


# Which images: --train-images, --test-images, --resample, --hold-out


def sorted_by_class(root, dataset, n=12, classes=10):
    """A data set whose first images are all of its first class; training image k is full of number
    k, test image k of 128 + k."""
    number = np.arange(n * classes, dtype=np.uint8)
    pixels = {split: (number + 128 * (split != "train"))[:, None, None].repeat(34, 1).repeat(34, 2)
              for split in COUNTS}
    if dataset == "mnist":
        return write_idx(root, "MNIST", {split: (images[:, :28, :28], number // n)
                                         for split, images in pixels.items()})
    write_tree(root, {split: {f"c{c}": list(images[number // n == c]) for c in range(classes)}
                      for split, images in pixels.items()})
    return root


SORTED = ("mnist", "folder", "h-imagenet")


@pytest.mark.parametrize("dataset", SORTED)
def test_some_images_are_of_all_classes_and_always_the_same(dataset, tmp_path):
    sorted_by_class(tmp_path, dataset)
    (tmp_path / "list.txt").write_text("".join(f"c{c}\n" for c in range(10)))
    some = dict(dataset=dataset, data_path=str(tmp_path), image_size=32, train_images=40,
                test_images=50, class_list=str(tmp_path / "list.txt"))

    def numbers(**fields):
        found = load(**some, **fields)
        kept = [(part.images[:, 0, 16, 16] - first).tolist()
                for part, first in ((found.train, 0), (found.test, 128))]
        for part, numbers in zip((found.train, found.test), kept, strict=True):
            assert part.labels.tolist() == [k // 12 for k in numbers]      # labels stay with images
            assert len(part.labels.unique()) >= 9                          # of 10 classes
        return kept
    train, test = numbers()
    assert len(set(train)) == 40 and len(set(test)) == 50
    assert numbers(seed=3) == [train, test]
    third, fourth, again = (numbers(seed=seed, resample=True) for seed in (3, 4, 3))
    assert third[0] != train != fourth[0] != third[0] and again == third
    assert third[1] == fourth[1] == test                                   # a test stays a test


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dataset", ["mnist", "folder"])
def test_hold_out_tests_every_tenth_training_image(dataset, held, tmp_path, monkeypatch):
    """Choosing on them, nobody sees the test images, nor is one trained on that is tested; moments
    are of those that are trained on."""
    sorted_by_class(tmp_path, dataset)
    monkeypatch.setattr(folders, "HELD_BYTES", folders.HELD_BYTES if held else 0)
    found = load(dataset=dataset, data_path=str(tmp_path), image_size=32, hold_out=True)
    for part, numbers in ((found.train, [k for k in range(120) if k % 10 != 9]),
                          (found.test, range(9, 120, 10))):
        images, labels, _ = next(part.batches([torch.arange(len(part))], CPU))
        assert images[:, 0, 16, 16].tolist() == list(numbers)
        assert labels.tolist() == [k // 12 for k in numbers]
    np.testing.assert_allclose(found.mean, moments_of(next(found.train.batches(
        [torch.arange(108)], CPU))[0])[0], rtol=1e-5)


def test_hold_out_of_training_images_of_which_some_are_kept_wants_ten(tmp_path):
    sorted_by_class(tmp_path, "folder")
    some = dict(dataset="folder", data_path=str(tmp_path), image_size=32, hold_out=True)
    found = load(**some, train_images=19)
    assert (len(found.train), len(found.test)) == (18, 1)
    with pytest.raises(Problem, match="--hold-out: every tenth of 9 training images"):
        load(**some, train_images=9)


def test_digits_are_drawn_for_their_split_and_seed(monkeypatch):
    for split, name in (("train", "DejaVuSans"), ("test", "cmss10")):      # one: drawn sooner
        monkeypatch.setitem(digits.TYPEFACES, split, [name])
    def draw(**fields):
        found = load(train_images=30, test_images=20, model="encapnet-small", **fields)
        assert len(found.train) == 30 and len(found.test) == 20
        assert found.classes == list("0123456789")
        return found.train.images, found.test.images
    train, test = draw()
    assert [torch.equal(a, b) for a, b in zip(draw(seed=1), (train, test), strict=True)] == [1, 1]
    new = draw(seed=1, resample=True)
    assert not torch.equal(new[0], train) and torch.equal(new[1], test)
    monkeypatch.setitem(digits.TYPEFACES, "test", ["cmr10"])
    new = draw()
    assert torch.equal(new[0], train) and not torch.equal(new[1], test)


# Folders: held in memory, or read by worker processes


def write_tree(root, splits):
    """{split: {class: [pixels (H, W, 3), ...]}} -> root/SPLIT/CLASS/*.png, last names first."""
    for split, classes in splits.items():
        for name, images in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for k, pixels in reversed(list(enumerate(images))):
                Image.fromarray(pixels).save(folder / f"{k:03}.png", compress_level=1)


def random_tree(root, test="test", side=34):
    """Images that differ in each channel; classes made in another order than their names'.

    -> {"train": (pixels (n, 3, H, W), labels (n,)), "test": the same}, classes and files by name
    """
    random, truth, splits = np.random.default_rng(1), {}, {}
    for split, counts in (("train", {"wasp": 5, "ant": 3, "bee": 9}),
                          (test, {"bee": 4, "wasp": 2, "ant": 6})):
        splits[split] = {name: list(random.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
                         for name, n in counts.items()}
        pixels = np.concatenate([splits[split][name] for name in ("ant", "bee", "wasp")])
        labels = [c for c, name in enumerate(("ant", "bee", "wasp")) for _ in range(counts[name])]
        truth["train" if split == "train" else "test"] = (
            torch.tensor(pixels).permute(0, 3, 1, 2), torch.tensor(labels))
    write_tree(root, splits)
    return truth


@pytest.fixture(params=["held", "by workers"])
def workers(request, monkeypatch):
    """Every folder is held in memory, or read by two processes whenever a batch is wanted."""
    if request.param == "by workers":
        monkeypatch.setattr(folders, "HELD_BYTES", 0)
    return 2


@pytest.mark.parametrize("dataset, test, augment", [
    ("folder", "test", "+"), ("folder", "val", "+"), ("imagenet", "val", "none")])
def test_a_folder_is_read_as_written_by_every_reader(dataset, test, augment, workers, tmp_path):
    """Colours, labels in the order of names, split, position; whatever the order asked for."""
    truth = random_tree(tmp_path, test)
    found = load(dataset=dataset, data_path=str(tmp_path), image_size=32, augment=augment,
                 model="encapnet-small")
    assert found.classes == ["ant", "bee", "wasp"]
    for part, (images, labels) in ((found.train, truth["train"]), (found.test, truth["test"])):
        order = torch.randperm(len(images))
        batches = list(part.batches(order.split(3), CPU, workers))
        assert [len(index) for _, _, index in batches] == [len(c) for c in order.split(3)]
        for batch, its_labels, index in batches:
            assert torch.equal(batch, images[index]) and torch.equal(its_labels, labels[index])
        assert torch.equal(torch.cat([index for *_, index in batches]), order)
    expected = moments_of(truth["train"][0])
    np.testing.assert_allclose(found.mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(found.std, expected[1], rtol=1e-4)


def test_an_epoch_shows_each_image_once_with_its_own_label_and_draws(workers, tmp_path,
                                                                     monkeypatch):
    truth, shown = random_tree(tmp_path)["train"], []
    step = fit.train_step
    monkeypatch.setattr(fit, "train_step", lambda run, images, labels, draws: shown.append(
        (images, labels, draws)) or step(run, images, labels, draws))
    monkeypatch.chdir(tmp_path)
    fit.fit(make_config(dataset="folder", data_path=".", model="cnn-same", set={"width": 1 / 32},
                        augment="++", batch_size=8, epochs=2, seed=5, workers=workers))
    for epoch, batches in enumerate((shown[:2], shown[2:])):               # 16 of 17 images
        images, labels, draws = map(torch.cat, zip(*batches, strict=True))
        number = [int((truth[0] == image).flatten(1).all(1).nonzero()) for image in images]
        order, numbers = shuffle(17, 5, epoch)
        assert number == order[:16].tolist() and len(shown) == 4
        assert torch.equal(labels, truth[1][number]) and torch.equal(draws, numbers[number])


@pytest.mark.parametrize("dataset", ["folder", "h-imagenet"])
def test_labels_stay_with_their_images_where_unreadable_ones_are_skipped(dataset, workers,
                                                                         tmp_path):
    truth = random_tree(tmp_path)
    for name in ("ant/001", "bee/000", "bee/008"):
        (tmp_path / f"train/{name}.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("ant bee wasp")
    readable = torch.tensor([k for k in range(17) if k not in (1, 3, 11)])
    found = load(dataset=dataset, data_path=str(tmp_path), unreadable="skip", augment="+",
                 image_size=32, class_list=str(tmp_path / "list.txt"))
    images, labels, _ = next(found.train.batches([torch.arange(14)], CPU))
    assert torch.equal(images, truth["train"][0][readable]) and len(found.train) == 14
    assert torch.equal(labels, truth["train"][1][readable])
    assert torch.equal(found.test.labels, truth["test"][1])


@pytest.mark.parametrize("width, height", [(96, 64), (64, 96), (50, 34), (16, 24)])
def test_the_short_side_is_resized_and_the_middle_is_cut_out(width, height, tmp_path):
    """A ramp along the long side stays a ramp, about the middle of the image."""
    long, short, side = max(width, height), min(width, height), 32
    ramp = np.tile(np.arange(long, dtype=np.uint8) * 2, (short, 1))
    ramp = ramp if width > height else ramp.T
    Image.fromarray(np.stack([ramp, 255 - ramp, ramp // 2], -1)).save(tmp_path / "ramp.png")
    image = decode(tmp_path / "ramp.png", side).int()
    assert image.shape == (3, side, side)
    steps = (torch.arange(side) + 0.5 - side / 2) * short / side           # pixels from the middle
    expected = 2 * (long / 2 - 0.5 + steps).clamp(0, long - 1)
    red = image[0] if width > height else image[0].T
    assert (red - expected).abs().max() < 2.5 and (image[0] + image[1] - 255).abs().max() <= 2


@pytest.mark.parametrize("width, height, resized, corner", [
    (96, 64, (48, 32), (8, 0)), (70, 100, (32, 46), (0, 7)),             # 45.7 is 46
    (16, 24, (32, 48), (0, 8)), (35, 32, (35, 32), (1, 0))])
def test_noise_is_resized_by_pils_bilinear_filter(width, height, resized, corner, tmp_path):
    """Downwards every pixel counts; a box is cut out first.  To the last bit."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, (left, top) = Image.fromarray(noise), corner
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    expected = torch.tensor(expected[top:top + 32, left:left + 32]).permute(2, 0, 1)
    assert torch.equal(decode(image, 32), expected)
    scene = Image.new("RGB", (200, 200), "red")
    scene.paste(image, (30, 50))
    scene.save(tmp_path / "scene.png")
    box = (30, 50, 30 + width, 50 + height)
    assert torch.equal(decode(tmp_path / "scene.png", 32, box), expected)


def random_states():
    """Of torch, numpy and Python."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_reading_images_draws_nothing_from_the_programs_random_numbers(workers, tmp_path,
                                                                      monkeypatch):
    """Nor does the order of an epoch; a run's own draws come from its seed."""
    random_tree(tmp_path)
    for split in ("train", "test"):                                        # one: drawn sooner
        monkeypatch.setitem(digits.TYPEFACES, split, ["DejaVuSans"])
    before = random_states()
    found = load(dataset="folder", data_path=str(tmp_path), image_size=32, train_images=12,
                 test_images=5, resample=True, seed=3, augment="+", model="encapnet-small")
    for part in (found.train, found.test):
        assert len(list(part.batches(torch.arange(len(part)).split(3), CPU, workers))) > 1
    shuffle(12, 3, 1)
    load(train_images=20, test_images=20, model="encapnet-small")
    assert random_states() == before


def test_the_same_files_labelled_otherwise_are_other_images(tmp_path):
    """The last of one class, as the first of the next: names, sizes and numbers stay in order."""
    random, paths = np.random.default_rng(0), []
    for split in ("train", "test"):
        for name in ("ant/1", "ant/2", "bee/3", "bee/4"):
            paths.append(tmp_path / "own" / split / f"{name}.png")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            noise = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(paths[-1])
    def source(root="own"):
        return load(dataset="folder", data_path=str(tmp_path / root), model="cnn-same").source
    before = source()
    shutil.copytree(tmp_path / "own", tmp_path / "elsewhere")
    assert source("elsewhere") == before
    for path in paths[1::4]:                              # ant/2 of either split
        path.rename(path.parents[1] / "bee" / path.name)
        assert source() != before
        (path.parents[1] / "bee" / path.name).rename(path)
    assert source() == before


def test_whole_pixels_are_cut_off(tmp_path):
    """Where one is left over the image is not resampled half a pixel off."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 35, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png")
    found = decode(tmp_path / "odd.png", 32)
    assert torch.equal(found, torch.tensor(pixels[:, 1:33]).permute(2, 0, 1))


def test_a_damaged_data_set_is_one_line(on_disk, cli):
    name, _ = on_disk
    files = [f for f in sorted(Path("own").rglob("*")) if f.is_file() and "meta" not in f.name]
    victim = next(f for f in files if re.search("train.*images|data_batch_3|train", f.name))
    victim.write_bytes(victim.read_bytes()[:-100])
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
        (Path("own") / split / "steps").mkdir()
        grey.convert("1").save(Path("own") / split / "steps" / "one.png")
    data = load(dataset="folder", data_path="own", augment="none")
    names = sorted(p.name for p in Path("own/train/ramp").iterdir())
    pixels = dict(zip(names, data.train.images.int(), strict=False))
    assert data.train.images.shape == (11, 3, 32, 32)
    for name in (*kinds, "turned.png"):
        assert (pixels[name] - torch.tensor(ramp).int()).abs().max() <= 4, name
    assert set(pixels["bits.png"].unique().tolist()) == {0, 255}
    done = cli("--dataset folder --data-path own --epochs 1", NARROW, "--batch-size 5")
    assert done.code == 0 and "own: 11 + 11 images" in done.out
    for split in ("train", "test"):
        shutil.rmtree(f"own/{split}/steps")
    assert_one_line(cli("--dataset folder --data-path own --epochs 1", NARROW), "one class, ramp")


RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
SCALES = {"float, to 1": (RAMP / np.float32(255), "tif"),
          "float, to 255": (RAMP.astype(np.float32), "tif"),
          "12 bits": (RAMP.astype(np.uint16) * 16, "png"),
          "16 bits": (RAMP.astype(np.uint16) * 257, "png"),
          "8 bits in 32": (RAMP.astype(np.int32), "tif"), "mask": (RAMP > 128, "png")}


@pytest.mark.parametrize("kind", SCALES)
def test_pixels_of_every_scale_are_what_they_look_like(kind, tmp_path):
    pixels, suffix = SCALES[kind]
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}")
    want = torch.tensor(255 * (RAMP > 128) if kind == "mask" else RAMP).int()
    for image in (tmp_path / f"x.{suffix}", pixels):
        assert (decode(image, 32).int() - want).abs().max() <= 1


@pytest.mark.parametrize("highest, white", [
    (1, 1), (1.01, 255), (255, 255), (256, 4095), (4095, 4095), (4096, 65535), (65535, 65535)])
def test_white_is_the_end_of_the_smallest_range_that_holds_an_image(highest, white):
    found = decode(np.resize(np.float32([0, highest]), (32, 32)), 32)
    assert found.unique().tolist() == [0, round(255 * highest / white)]


@pytest.mark.parametrize("values", [(-1, 1), (0, 1e6), (0, np.nan)])
def test_pixels_of_no_known_scale_are_refused_by_name(values, copy, cli):
    pixels = np.resize(np.float32(values), (32, 32))
    Image.fromarray(pixels).save(copy / "train/ant/odd.tif")
    assert_one_line(cli(COPY), "train/ant/odd.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """Its left half; the right half is half so, and what it has of black comes out grey."""
    if mode == "P":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.save(tmp_path / "x.png", transparency=bytes([0, 127]))
        image.paste(1, (16, 0, 32, 32))
        image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    else:
        alpha = Image.new("L", (32, 32), 0)
        alpha.paste(128, (16, 0, 32, 32))
        image = Image.new(mode, (32, 32), 0)
        image.putalpha(alpha)
        image.save(tmp_path / "x.png")
    found = decode(tmp_path / "x.png", 32).int()
    assert (found[:, :, :16] == 255).all() and (found[:, :, 16:] - 127).abs().max() <= 6


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_with_a_damaged_exif_block_is_read_a_damaged_picture_is_not(suffix, tmp_path):
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).save(file, exif=b"Exif\0\0no block")
    assert (decode(file, 32)[0].int() - torch.tensor(RAMP).int()).abs().max() <= 8
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, exif=b"Exif\0\0no block")
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(OSError):
        decode(file, 32)


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


def test_hidden_files_and_links_within_a_class_are_passed_over(copy, cli, trained):
    """By training and by --predict; a folder within a class is looked into, and a class may be a
    link."""
    other = copy / "train/ant/0.png"
    for name in ("train/ant/._0.png", "train/.hidden/0.png", "train/ant/.ipynb_checkpoints/0.png",
                 "train/__MACOSX/0.png", "test/__MACOSX/0.png", "train/ant/__MACOSX/0.png",
                 "train/ant/deep/er/0.JFIF"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(other, copy / name)
    for name, target in (("train/ant/loop", "."), ("train/ant/deep/loop", "../..")):
        (copy / name).symlink_to(target)
    (copy / "train/bee").rename(copy / "bees")
    (copy / "train/bee").symlink_to("../bees")
    done = cli(COPY)
    assert done.code == 0 and "copy: 37 + 15 images, 3 classes" in done.out, done
    seen = cli(f"--resume {trained} --predict copy/train/ant").out.splitlines()
    assert len(seen) == 13 and not [line for line in seen if "/." in line or "MACOSX" in line]


def test_files_that_are_no_images_are_named_once_a_folder(copy, cli):
    for name in ("train/ant/a.heic", "train/bee/b.txt", "train/bee/c.txt"):
        (copy / name).write_text("")
    told, = (line for line in cli(COPY).out.splitlines() if ".heic" in line)
    assert told.startswith("copy/train:") and told.count(".txt") == 1


def test_a_link_to_nothing_is_named(copy, cli):
    (copy / "train/ant/gone.png").symlink_to("nowhere.png")
    assert_one_line(cli(COPY), "train/ant/gone.png", code=2)


@pytest.mark.parametrize("suffix", "jpg jpeg jfif png bmp gif ppm tif tiff webp pgm".split())
def test_an_image_is_known_by_these_suffixes_and_read(suffix, copy):
    """Of one colour, that no format changes by much."""
    image = Image.new("L" if suffix == "pgm" else "RGB", (32, 32), "gray")
    for name in (f"x.{suffix}", f"X.{suffix.upper()}"):
        image.save(copy / "test/ant" / name)
    found = load(dataset="folder", data_path=str(copy), model="cnn-same").test.images
    grey = (found.int() - 128).abs().amax((1, 2, 3)) <= 3
    assert len(found) == 15 + 2 and grey.sum() == 2


def test_folder_layouts_that_cannot_work(copy, cli):
    (copy / "test/dog").mkdir()
    shutil.copy(copy / "test/ant/0.png", copy / "test/dog")
    assert_one_line(cli(COPY), "test has classes that training has not: dog")
    shutil.rmtree(copy / "test/dog")
    for path in (copy / "train/cat").iterdir():
        path.unlink()
    assert_one_line(cli(COPY), "no images in cat")
    shutil.rmtree(copy / "test")
    assert_one_line(cli(COPY), "copy/test", "(or val)")
    shutil.move(copy / "train", copy / "val")             # is no training set
    assert_one_line(cli(COPY), "copy/train", "train/CLASS/*.jpg")
    (copy / "train").mkdir()
    assert_one_line(cli(COPY), "no class folders")
    assert_one_line(cli(FOLDER, "--data-path nowhere"), "nowhere/train")
    assert_one_line(cli(FOLDER.replace("32", "99")), "--train-images 99", "only 36")


def test_val_is_read_where_there_is_no_test(copy):
    fields = dict(dataset="folder", data_path=str(copy), model="cnn-same")
    shutil.copytree(copy / "test", copy / "val")
    (copy / "val/ant/0.png").unlink()
    assert len(load(**fields).test) == 15
    shutil.rmtree(copy / "test")
    assert len(load(**fields).test) == 14


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_class_without_test_images_is_said_once_and_the_rest_is_tested(name, copy, cli):
    """Its folder empty or not there; the line names the folder that is read."""
    (copy / "test").rename(copy / name)
    shutil.rmtree(copy / name / "ant")
    for path in (copy / name / "cat").iterdir():
        path.unlink()
    done = cli(COPY)
    assert done.code == 0 and "copy: 36 + 5 images, 3 classes" in done.out
    assert done.out.count(f"copy/{name}: no images in ant, cat") == 1
    assert f"reading 5 images of copy/{name}" in done.out
    found = load(dataset="folder", data_path="copy", model="encapnet-small")
    assert found.classes == ["ant", "bee", "cat"] and found.test.labels.tolist() == 5 * [1]
    shutil.rmtree(copy / name / "bee")
    assert_one_line(cli(COPY)._replace(out=""), f"copy/{name}: no images in ant, bee, cat")


def imagenet_tree(root, names=("n01", "n02", "n03")):
    for split, n in (("train", 4), ("val", 2)):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(n):
                Image.new("RGB", (100, 80), (k, 0, 0)).save(folder / f"{name}_{split}_{k}.JPEG")


def annotate(file, *boxes):
    """ImageNet's XML: (left, top, right, bottom) of each object."""
    names = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join("<object><bndbox>" + "".join(
        f"<{name}>{value}</{name}>" for name, value in zip(names, box, strict=True))
        + "</bndbox></object>" for box in boxes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"<annotation>{objects}</annotation>")


H_IMAGENET = f"--dataset h-imagenet --data-path own --image-size 32 --epochs 1 {NARROW} " \
    "--batch-size 4 --class-list list.txt"


def test_h_imagenet_cuts_boxes_and_checks(cli):
    imagenet_tree(Path("own"))
    annotate(Path("own/Annotations/n02/n02_train_0.xml"), (15, 25, 65, 75), (30, 20, 90, 80))
    Path("list.txt").write_text("n02\nn03\n")
    done = cli(H_IMAGENET)
    assert done.code == 0 and "h-imagenet: 9 + 4 images, 2 classes" in done.out
    Path("list.txt").write_text("n02\nn77\n")
    assert_one_line(cli(H_IMAGENET), "own/train", "n77")
    (Path("own") / "Annotations/n02/n02_train_0.xml").write_text("<annotation><object>")
    assert_one_line(cli(H_IMAGENET), "n02_train_0.xml is damaged")
    assert_one_line(cli(H_IMAGENET.replace("list.txt", "none.txt")), "none.txt")


def test_a_box_is_enlarged_by_a_tenth_of_its_sides_if_they_have_50_pixels(tmp_path):
    """Of an image with small boxes alone none is left; without a box it is not annotated."""
    annotate(tmp_path / "Annotations/n02/one.xml", (15, 25, 65, 105), (60, 20, 160, 70))
    annotate(tmp_path / "Annotations/n02/two.xml", (0, 0, 49, 99), (20, 40, 70, 90), (0, 0, 99, 49))
    annotate(tmp_path / "Annotations/small.xml", (0, 0, 49, 99), (0, 0, 99, 49))
    annotate(tmp_path / "Annotations/none.xml")
    assert annotated_boxes(tmp_path) == {"one": [(10, 17, 70, 113), (50, 15, 170, 75)],
                                         "two": [(15, 35, 75, 95)], "small": []}


def test_h_imagenet_is_the_listed_classes_their_objects_cut_out(workers, tmp_path):
    """Of 68 pixels, from which crops are cut; an object each, the whole image where no box is."""
    truth, random = random_tree(tmp_path, "val", 68), np.random.default_rng(2)
    scene = random.integers(0, 256, (120, 150, 3), dtype=np.uint8)
    for name in ("scene", "small"):
        Image.fromarray(scene).save(tmp_path / f"train/bee/{name}.png")
    annotate(tmp_path / "Annotations/scene.xml", (20, 30, 76, 86), (80, 10, 136, 66))
    annotate(tmp_path / "Annotations/small.xml", (20, 30, 60, 86))
    (tmp_path / "list.txt").write_text("bee\nwasp\n")
    objects = torch.tensor(np.stack([scene[24:92, 14:82], scene[4:72, 74:142]])).permute(0, 3, 1, 2)
    images, labels = truth["train"]
    expected = torch.cat([images[labels == 1], objects, images[labels == 2]])
    found = load(dataset="h-imagenet", data_path=str(tmp_path), image_size=64,
                 class_list=str(tmp_path / "list.txt"))
    for part, pixels, counts in ((found.train, expected, (11, 5)),
                                 (found.test, truth["test"][0][truth["test"][1] > 0], (4, 2))):
        pictures, numbers, _ = next(part.batches([torch.arange(sum(counts))], CPU))
        assert len(part) == sum(counts) and torch.equal(pictures, pixels)
        assert numbers.tolist() == counts[0] * [0] + counts[1] * [1]
    assert found.classes == ["bee", "wasp"]


def test_h_imagenets_classes_are_the_authors_200(cli):
    """Hardest first; ImageNet's other classes are none of them."""
    names = (Path(folders.__file__).parent / "h-imagenet-classes.txt").read_text().split()
    assert len(set(names)) == len(names) == 200
    assert [names[0], names[1], names[-1]] == ["n04355933", "n04525038", "n02090721"]
    imagenet_tree(Path("own"), (*names, "n01440764"))
    found = load(dataset="h-imagenet", data_path="own", image_size=4)
    assert found.classes == names and (len(found.train), len(found.test)) == (800, 400)
    shutil.rmtree(f"own/train/{names[3]}")
    assert_one_line(cli(H_IMAGENET.replace("--class-list list.txt", "")), "own/train", names[3])


def test_a_class_whose_objects_are_all_small_has_no_images(cli):
    imagenet_tree(Path("own"))
    for k in range(4):
        annotate(Path(f"own/Annotations/n02_train_{k}.xml"), (0, 0, 40, 40))
    Path("list.txt").write_text("n02\nn03\n")
    assert_one_line(cli(H_IMAGENET), "own/train", "n02")


# ---- Augmentation   [App. C] ---------------------------------------------------------------------

@pytest.mark.parametrize("channels, room", [(1, 2), (3, 2), (3, 6)])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_torchvisions_image_by_image(channels, room, flip):
    """Draws are: top, left, mirror, then brightness, contrast, saturation, hue up to +-0.2."""
    images = torch.randint(256, (40, channels, 32 + room, 32 + room), dtype=torch.uint8)
    images[0] = images[1, :, :1, :1]                      # a uniform image, and a grey one
    images[2] = images[2, :1]
    draws = torch.rand(40, 7)
    draws[3], draws[4] = 0, 1 - 2**-24
    ours = augmented(images, draws, 32, "++", flip)
    plain = augmented(images, draws, 32, "+", flip)
    for image, draw, jittered, cropped in zip(images, draws.tolist(), ours, plain, strict=True):
        x = T.crop(image, *(int(d * (room + 1)) for d in draw[:2]), 32, 32)
        x = T.to_dtype(T.horizontal_flip(x) if flip and draw[2] < 0.5 else x, scale=True)
        torch.testing.assert_close(cropped, x)
        brightness, contrast, saturation, hue = (0.2 * (2 * d - 1) for d in draw[3:])
        x = T.adjust_contrast(T.adjust_brightness(x, 1 + brightness), 1 + contrast)
        if channels == 3:
            x = T.adjust_hue(T.adjust_saturation(x, 1 + saturation), hue)
        torch.testing.assert_close(jittered, x, rtol=0, atol=2e-5)
    for side in (32, 32 + room):                          # unless asked for, the centre
        x = T.center_crop(images, side) / 255
        x = torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), x.flip(3), x) if flip else x
        torch.testing.assert_close(augmented(images, draws, side, "none", flip), x)


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
