"""Train, test and tabulate the networks of encapnet.py.

    python train.py                                        three minutes on a laptop; needs no data
    python train.py --dataset mnist --model encapnet6      the paper's settings; flags change them
    python train.py --dataset folder --data-path DIR       your images: DIR/{train,test}/CLASS/*.jpg
    python train.py --resume                               go on with the newest unfinished run
    python train.py --resume RUN --test-only               or --predict IMAGE...
    python train.py --table 3 --seeds 3 --recipe fast      a table of the paper; also --figure 2, 4
    python train.py --bench --model capnet-em --batch-size 4
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-path DIR
    python train.py --list; python train.py --help         every model, data set, table; every flag

A run is a folder, runs/DATASET-MODEL-0 and counting: log.jsonl (configuration, machine, an entry an
epoch), last.pt and previous.pt (checkpoints), curves.png, result.json.  Killed at any moment it
goes on with --resume as if nothing had happened.  runs/results.jsonl collects the results.
"""
import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import encapnet

RUNS, PUBLISHED, README = Path("runs"), Path("results"), Path("README.md")


class Problem(Exception):
    """Whatever a user can put right: one line on stderr and an exit code, no traceback."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Diverged(Problem):
    """Training is no longer finite."""


def reason(error):
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


# ------------------------------------------------------------------------------------------------
# Config: a field is a flag.  Defaults are the paper's [Sec. 5, Implementation details]
# ------------------------------------------------------------------------------------------------


def did_you_mean(word, known):
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(known):
    """Argument type: a name that known(), evaluated late, holds."""
    def parse(text):
        if text not in known():
            hint = did_you_mean(text, known()) or f": choose from {', '.join(known())}"
            raise argparse.ArgumentTypeError(f"unknown name {text!r}{hint}")
        return text
    return parse


def number(low, kind=int):
    """Argument type: a finite number from low on."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) < math.inf:
                return kind(text)
        noun = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r}: must be a {noun}, at least {low}")
    return parse


def assignment(text):
    """Argument type: types=8 -> ("types", 8); values are Python literals, else strings."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


def option(default, group, help, *, type=None, free=False, **flag):
    """A field of Config and its flag.  free: no part of a run's identity, may change on resume."""
    metadata = dict(group=group, help=help, type=type, free=free, flag=flag)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


data_option = functools.partial(option, group="data [Sec. 5; App. C]")
model_option = functools.partial(option, group="model and loss [Secs. 3, 5; App. A, B]")
train_option = functools.partial(option, group="optimisation [Sec. 5]")
run_option = functools.partial(option, group="running", free=True)
AUGMENT = {"none": "as they are", "+": "random crop of an enlarged image, multi-crop test",
           "++": "also flip (not digits), colour jitter 0.2, schedule x 1.5"}
LOSSES = ("margin", "spread", "spread-fixed", "ce")
OPTIMIZERS = ("adam", "rmsprop", "sgd")


@dataclasses.dataclass
class Config:
    dataset: str = data_option("digits", help="see --list", type=one_of(lambda: DATASETS))
    data_path: str = data_option("data", help="where data sets are, or go", free=True,
                                 metavar="DIR")
    image_size: int = data_option(0, help="side of the images; 0: the data set's", type=number(0))
    train_images: int = data_option(0, help="use only N, always the same; 0: all", type=number(0),
                                    metavar="N")
    test_images: int = data_option(0, help="the same for the test", type=number(0), metavar="N")
    augment: str = data_option("none", type=one_of(lambda: AUGMENT),
                               help="; ".join(f"{k}: {v}" for k, v in AUGMENT.items()))
    flip: bool = data_option(False, help="mirror training images at random (++: yes, digits: no)")
    class_list: str = data_option("", help="h-imagenet: file of 200 class folders; none: build it",
                                  metavar="FILE")
    unreadable: str = data_option("stop", help="images that cannot be read: stop, or skip and "
                                  "report; trust: do not look beforehand", free=True,
                                  type=one_of(lambda: ("stop", "skip", "trust")))
    workers: int = data_option(min(8, os.cpu_count() or 1), help="processes that read image files",
                               free=True, type=number(0))
    model: str = model_option("encapnet", help="see --list", type=one_of(lambda: models()))
    set: dict = model_option({}, help="a keyword of the model, such as types=8; repeatable",
                             type=assignment, action="append", metavar="KEY=VALUE")
    loss: str = model_option("", help="margin, spread, spread-fixed, ce; networks with logits: ce",
                             type=one_of(lambda: LOSSES))
    lam: float = model_option(10.0, help="weight of the feedback divergence", type=number(0, float))
    recipe: str = train_option("default", type=one_of(lambda: ("default", "fast")),
                               help="default: the paper's (digits: its own); fast: for one evening")
    optimizer: str = train_option("adam", help="adam, rmsprop, sgd [Table 5]",
                                  type=one_of(lambda: OPTIMIZERS))
    lr: float = train_option(1e-4, help="learning rate", type=number(0, float))
    weight_decay: float = train_option(5e-4, help="L2 penalty", type=number(0, float))
    batch_size: int = train_option(128, help="over all processes", type=number(1))
    epochs: int = train_option(600, help="scales the milestones with it", type=number(0), free=True)
    schedule: str = train_option("steps", help="steps or one-cycle",
                                 type=one_of(lambda: ("steps", "one-cycle")))
    milestones: tuple = train_option((200, 300, 400), help="epochs at which the rate falls",
                                     type=number(1), nargs="+", metavar="EPOCH")
    gamma: float = train_option(0.1, help="by this factor", type=number(0, float))
    seed: int = train_option(0, help="of weights, order and augmentation", type=number(0))
    device: str = run_option("auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    amp: bool = run_option(False, help="bfloat16 where it is safe; recipe fast: on a GPU, yes")
    compile: bool = run_option(False, help="torch.compile the model")
    channels_last: bool = run_option(False, help="memory format of images and convolutions")
    deterministic: bool = run_option(False, help="bit-exact on a GPU too, slower")
    output_dir: str = run_option("", help="folder of the run (default: a new one in runs/)",
                                 metavar="DIR")
    resume: str = run_option(None, help="go on with a run: its folder, or the newest unfinished",
                             nargs="?", const="newest", metavar="PATH")
    save_every: float = run_option(60.0, help="seconds between checkpoints, 0: every step",
                                   type=number(0, float))
    print_freq: int = run_option(50, help="steps between looks at the loss", type=number(1))


RECIPES = {    # what a data set changes in the paper's settings
    "digits": dict(model="encapnet-small", epochs=2, schedule="one-cycle", lr=3e-3, batch_size=64,
                   lam=0.1, train_images=16000, test_images=2000, channels_last=True),
    "h-imagenet": dict(batch_size=256),
    "imagenet": dict(batch_size=256),
}
FAST = dict(schedule="one-cycle", epochs=30, batch_size=512, lr=4e-3, weight_decay=5e-4)


def merge(*layers):
    """Changes to a Config, the later ones over the earlier; `set` is merged key by key."""
    merged = {}
    for layer in layers:
        both = {**merged.get("set", {}), **layer.get("set", {})}
        merged = {**merged, **layer, "set": both}
    return merged


def make_config(**given):
    """The Config of a request: given > --recipe fast > the data set's recipe > the paper."""
    dataset = given.get("dataset", Config.dataset)
    settings = merge(RECIPES.get(dataset, {}), FAST if given.get("recipe") == "fast" else {})
    before = Config(**settings)                                          # without the user's wishes
    config = Config(**merge(settings, given))
    if config.augment == "++" and "epochs" not in given:
        config.epochs = round(1.5 * config.epochs)                       # our choice
    if "milestones" not in given:
        stretch = config.epochs / max(1, before.epochs)
        config.milestones = tuple(max(1, round(m * stretch)) for m in config.milestones)
    source = DATASETS[config.dataset]
    config.image_size = config.image_size or max(source.side, MODEL_SIDE.get(config.model, 0))
    if config.model == "encapnet" and config.image_size >= 128:
        config.set = {"stem_stride": 4, **config.set}                    # our choice
    if "flip" not in given:
        config.flip = config.augment == "++" and source.flips
    if config.recipe == "fast" and "amp" not in given:
        config.amp = pick_device(config.device).type == "cuda"
    config.loss = config.loss or ("ce" if has_logits(config.model) else "margin")
    if has_logits(config.model) and config.loss != "ce":
        raise Problem(f"--loss {config.loss} needs capsule lengths; {config.model} has logits: ce")
    return config


def flags(fields):
    """{field of Config: value} -> the words of a command line that give them."""
    words = []
    for name, value in fields.items():
        flag = name.replace("_", "-")
        if isinstance(value, dict):
            words += [f"--{flag}={k}={v!r}" for k, v in value.items()]
        elif isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            many = isinstance(value, (list, tuple))
            words += [f"--{flag}", *map(str, value if many else [value])]
    return words


def data_name(config):
    """The name of the data in tables: a folder's own, so cifar10-jpeg is not taken for cifar10."""
    return Path(config.data_path).resolve().name if config.dataset == "folder" else config.dataset


def identity(config):
    """The fields that decide a result, as plain JSON; epochs apart, which may grow."""
    fields = [f.name for f in dataclasses.fields(Config) if not f.metadata["free"]]
    plain = json.loads(json.dumps({name: getattr(config, name) for name in fields}))
    return {**plain, "dataset": data_name(config)}


def config_key(config):
    """A name for the result, the same for every seed."""
    fields = {**identity(config), "epochs": config.epochs, "seed": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------
# Models: those of encapnet.py, and the peers of Table 4 from torchvision
# ------------------------------------------------------------------------------------------------

PEERS = {"resnet101": {}, "wide_resnet101_2": {}, "vgg16": {},
         "googlenet": dict(aux_logits=False, init_weights=True)}
MODEL_SIDE = {"encapnet-v2": 128, "encapnet-v3": 224}


def models():
    return [*encapnet.MODELS, *PEERS]


def has_logits(model):
    return model in PEERS or encapnet.MODELS[model][0].logits


class Peer(nn.Module):
    """A torchvision network with our interface: (logits, no feedback)."""

    logits = True

    def __init__(self, name, num_classes, **keywords):
        super().__init__()
        import torchvision
        self.net = getattr(torchvision.models, name)(num_classes=num_classes, **keywords)

    def forward(self, x):
        logits = self.net(x)
        return logits, logits.new_zeros(())


def make_model(config, classes, channels):
    try:
        if config.model in PEERS:
            return Peer(config.model, classes, **{**PEERS[config.model], **config.set})
        return encapnet.build(config.model, classes, channels, config.image_size, **config.set)
    except (ValueError, TypeError) as error:
        raise Problem(f"model {config.model}: {error}") from error


# ------------------------------------------------------------------------------------------------
# Datasets: small sets are uint8 tensors on the device, big ones are read by worker processes
# ------------------------------------------------------------------------------------------------

HELD_BYTES = 4 << 30          # image folders up to this size are decoded once and held
HUGE_PIXELS = 100_000_000     # a larger image is refused rather than decoded
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


class Files(torch.utils.data.Dataset):
    """Image files, decoded when asked for."""

    def __init__(self, paths, side):
        self.paths, self.side = paths, side

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, k):
        try:
            return decode(self.paths[k], self.side), k
        except Exception as error:
            raise Problem(f"cannot read {self.paths[k]}: {error}", 1) from error


@dataclasses.dataclass
class Split:
    """Half of a data set.   images (n, C, R, R) uint8, or Files;  labels (n,)"""

    images: Tensor | Files
    labels: Tensor

    def __len__(self):
        return len(self.labels)

    def batches(self, chunks, device, workers=0):
        """(images, labels, index) of each chunk, a tensor of positions; all on the device."""
        if isinstance(self.images, Tensor):
            for index in chunks:
                images = self.images[index.to(self.images.device)].to(device)
                yield images, self.labels[index], index
            return
        loader = torch.utils.data.DataLoader(
            self.images, batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=workers,
            pin_memory=device.type == "cuda", generator=torch.Generator())
        try:
            for images, index in loader:
                index = index.to(device, non_blocking=True)
                yield images.to(device, non_blocking=True), self.labels[index], index
        except Problem as error:                          # comes with the worker's traceback
            last = str(error).strip().splitlines()[-1]
            raise Problem(last.removeprefix("train.Problem: "), 1) from None


@dataclasses.dataclass
class Data:
    """A data set.   side: of what the model sees;  mean, std: (C,), of training images in [0, 1]"""

    name: str
    classes: list
    train: Split
    test: Split
    side: int
    mean: Tensor
    std: Tensor

    @property
    def channels(self):
        return len(self.mean)


def chosen(n, wanted, what):
    """Positions of the images that --train-images, --test-images keep, the same every time."""
    if wanted > n:
        raise Problem(f"--{what}-images {wanted}: there are only {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:wanted].sort().values if wanted else torch.arange(n)


def fit_side(images, side):
    """(n, C, H, W) uint8 -> (n, C, side, side): 28 to 32 by a border, anything else by resizing."""
    from torchvision.transforms.v2 import functional as T
    if images.shape[-1] == side:
        return images
    if (images.shape[-1], side) == (28, 32):
        return F.pad(images, (2, 2, 2, 2))
    return torch.cat([T.resize(part, [side, side], antialias=True) for part in images.split(4096)])


def enlarged(side):
    """Side of the image that a crop is cut from.   [App. C]"""
    return {32: 34, 128: 156, 224: 256}.get(side, round(side * 34 / 32))


def load_digits(config, held):
    counts = (config.train_images or 10000, config.test_images or 2000)
    return [draw_digits(n, split == "train")[:2]
            for n, split in zip(counts, ("train", "test"), strict=True)], \
        [str(k) for k in range(10)]


TORCHVISION = {   # class; what to fetch by hand and where to put it
    "mnist": ("MNIST", "the four *-ubyte.gz of https://ossci-datasets.s3.amazonaws.com/mnist/ "
              "in {root}/MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "the four *-ubyte.gz of http://fashion-mnist.s3-website."
                      "eu-central-1.amazonaws.com/ in {root}/FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {root}"),
    "cifar100": ("CIFAR100", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in {root}"),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat of "
             "http://ufldl.stanford.edu/housenumbers/ in {root}"),
}


def load_torchvision(config, held):
    """One of torchvision's data sets, downloaded and checksummed by it."""
    import torchvision.datasets
    name, by_hand = TORCHVISION[config.dataset]
    splits = []
    for split in ("train", "test"):
        which = {"split": split} if name == "SVHN" else {"train": split == "train"}
        read = functools.partial(getattr(torchvision.datasets, name), config.data_path, **which)
        try:
            try:
                part = read()
            except RuntimeError:                          # not there, or a wrong checksum
                part = read(download=True)
            images = torch.as_tensor(part.data)
            labels = torch.as_tensor(part.labels if name == "SVHN" else part.targets).long()
            if len(images) != len(labels) or not len(images):
                raise ValueError(f"{len(images)} images, {len(labels)} labels")
        except Exception as error:                        # torchvision raises all kinds
            raise Problem(
                f"{config.dataset}: no intact {split} files under {config.data_path}, and no "
                f"download ({reason(error)}); put a fresh copy of "
                f"{by_hand.format(root=config.data_path)}") from error
        images = images.unsqueeze(1) if images.dim() == 3 else images
        images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
        keep = chosen(len(images), getattr(config, f"{split}_images"), split)
        splits.append((images[keep], labels[keep]))
    return splits, [str(c) for c in getattr(part, "classes", range(10))]


def decode(file, side, box=None):
    """An image file of any mode -> (3, side, side) uint8: short side resized, centre cropped.

    box: (left, top, right, bottom) to cut out first
    """
    from PIL import Image, ImageOps
    Image.MAX_IMAGE_PIXELS = None                         # our own limit, an error, follows
    with Image.open(file) as image:
        if image.width * image.height > HUGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {HUGE_PIXELS:,}")
        if image.mode.startswith("I"):                    # 16 bits, whichever way stored
            image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
        clear = "transparency" in image.info              # a palette with a transparent colour
        image = ImageOps.exif_transpose(image).convert("RGBA" if clear else "RGB")
        image = image.convert("RGB").crop(box) if box else image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(s * scale)) for s in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    if width != height:
        image = image.crop((left, top, left + side, top + side))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(side, side, 3).permute(2, 0, 1)


def image_files(root, split, classes=None):
    """The class folders of a split and (path, class) of every image, in the order of names."""
    folder = next((root / name for name in (split, "val") if (root / name).is_dir()), root / split)
    if not folder.is_dir():
        raise Problem(f"no folder {folder}: images go to {root}/train/CLASS/*.jpg "
                      f"and {root}/test/CLASS/*.jpg")
    found = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise Problem(f"{folder} has classes that training has not: {', '.join(unknown)}")
    if not found:
        raise Problem(f"{folder} has no class folders: images go to {folder}/CLASS/*.jpg")
    files = [(str(path), name) for name in found for path in sorted((folder / name).iterdir())
             if path.suffix.lower() in SUFFIXES]
    empty = sorted(set(found) - {name for _, name in files})
    if empty:
        raise Problem(f"{folder}: no images in {', '.join(empty)}")
    return found, files


def read_files(paths, side, attempt, unreadable):
    """attempt(k) for every file, in threads -> positions of the readable ones; reports others."""
    def failure(k):
        try:
            attempt(k)
        except Exception as error:
            return f"{paths[k]} ({reason(error)})"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        failures = list(pool.map(failure, range(len(paths))))
    bad = [f for f in failures if f]
    if bad:
        few = ", ".join(bad[:3]) + ", ..." * (len(bad) > 3)
        report = f"{len(bad)} of {len(paths)} images cannot be read: {few}"
        if unreadable != "skip" or len(bad) == len(paths):
            raise Problem(f"{report}; mend or remove them, or --unreadable skip")
        say(f"skipped: {report}")
    return [k for k, f in enumerate(failures) if not f]


def load_folder(config, held):
    """train/CLASS/*.jpg and test/CLASS/*.jpg (or val/), held in memory where they fit."""
    root, splits, classes = Path(config.data_path), [], None
    for split in ("train", "test"):
        found, files = image_files(root, split, classes)
        classes = classes or found
        files = [files[k] for k in chosen(len(files), getattr(config, f"{split}_images"), split)]
        paths = [path for path, _ in files]
        labels = torch.tensor([classes.index(name) for _, name in files])
        images = Files(paths, held)
        if len(paths) * 3 * held ** 2 <= HELD_BYTES:
            say(f"reading {len(paths):,} images of {root / split}")
            images = torch.empty(len(paths), 3, held, held, dtype=torch.uint8)
            keep = read_files(paths, held, lambda k, images=images, paths=paths:
                              images[k].copy_(decode(paths[k], held)), config.unreadable)
            images = images if len(keep) == len(images) else images[keep]
        elif config.unreadable == "trust":
            keep = range(len(paths))
        else:
            say(f"checking {len(paths):,} images of {root / split} (--unreadable trust: do not)")
            keep = read_files(paths, held, lambda k, paths=paths: decode(paths[k], held),
                              config.unreadable)
            images = Files([paths[k] for k in keep], held)
        splits.append((images, labels[list(keep)]))
    return splits, classes


H_IMAGENET_IMAGES = {"train": 255_725, "test": 17_101}        # the paper's  [Sec. 5]


def hard_classes(config, root, hardest=200):
    """The classes on which ResNet-18 errs most: --class-list, or measured once and kept."""
    file = Path(config.class_list or root / "h-imagenet-classes.txt")
    if not file.exists() and not config.class_list:
        import torchvision.models
        found, files = image_files(root, "test")
        if len(found) != 1000:
            raise Problem(f"{root}: the hardest classes are chosen among 1000, not {len(found)}; "
                          "give them with --class-list FILE")
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        try:
            net = torchvision.models.resnet18(weights=weights).eval()
        except (OSError, RuntimeError) as error:
            raise Problem(
                f"no ResNet-18 to choose classes with: {reason(error)}; download {weights.url} to "
                f"{torch.hub.get_dir()}/checkpoints, or give --class-list FILE") from error
        right, scale = torch.zeros(1000), weights.transforms()
        images = Files([path for path, _ in files], 256)
        for batch, index in torch.utils.data.DataLoader(images, 64, num_workers=config.workers):
            truth = torch.tensor([found.index(files[k][1]) for k in index.tolist()])
            with torch.no_grad():
                right.index_add_(0, truth, (net(scale(batch)).argmax(1) == truth).float())
        number = torch.bincount(torch.tensor([found.index(name) for _, name in files]))
        worst = (right / number).argsort()[:hardest].tolist()
        write_file(file, "".join(f"{found[k]}\n" for k in sorted(worst)).encode())
    try:
        return file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"--class-list {file}: {error}") from error


def annotated_boxes(root, padding=0.1):
    """{image name: its boxes (left, top, right, bottom), enlarged}, from ImageNet's annotations."""
    from xml.etree import ElementTree
    boxes = {}
    for file in sorted((root / "Annotations").rglob("*.xml")):
        try:
            for box in ElementTree.parse(file).iter("bndbox"):
                left, top, right, bottom = (
                    int(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
                dx, dy = padding * (right - left), padding * (bottom - top)
                enlarged_box = (left - dx, top - dy, right + dx, bottom + dy)
                boxes.setdefault(file.stem, []).append(tuple(map(round, enlarged_box)))
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise Problem(f"annotation {file} is damaged: {error}") from error
    return boxes


def checksum(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def cached_images(folder, samples, side, config):
    """Samples [(path, box or None, class)], decoded into a file once -> mapped images, samples."""
    fingerprint = hashlib.sha256(json.dumps([samples, side]).encode()).hexdigest()[:16]
    file = folder / f"{fingerprint}.bin"
    note = file.with_suffix(".json")
    if note.exists() and file.exists():
        about = json.loads(note.read_text())
        if checksum(file) != about["crc"]:
            raise Problem(f"{file} is damaged (checksum): delete it and run again")
        samples = [samples[k] for k in about["kept"]] if "kept" in about else samples
        shape = (len(samples), 3, side, side)
        return torch.from_file(str(file), size=math.prod(shape), dtype=torch.uint8).view(shape), \
            samples
    folder.mkdir(exist_ok=True)
    say(f"decoding {len(samples):,} images into {file}")
    shape = (len(samples), 3, side, side)
    images = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=torch.uint8)
    images = images.view(shape)
    paths = [path for path, _, _ in samples]
    kept = read_files(paths, side, lambda k: images[k].copy_(decode(paths[k], side, samples[k][1])),
                      config.unreadable)
    if len(kept) < len(samples):
        return cached_images(folder, [samples[k] for k in kept], side, config)
    write_file(note, json.dumps({"crc": checksum(file), "images": len(samples)}).encode())
    return images, samples


def load_h_imagenet(config, held):
    """The paper's subset: hard classes, objects cut out where boxes are given.   [Sec. 5]"""
    root = Path(config.data_path)
    classes, boxes, splits = hard_classes(config, root), annotated_boxes(root), []
    for split in ("train", "test"):
        found, files = image_files(root, split)
        missing = sorted(set(classes) - set(found))
        if missing:
            raise Problem(f"{root}: no {split} images of {len(missing)} classes: {missing[:3]}")
        samples = [(path, box, name) for path, name in files if name in set(classes)
                   for box in boxes.get(Path(path).stem, [None])]
        say(f"h-imagenet: {len(samples):,} {split} images of {len(classes)} classes; the paper has "
            f"{H_IMAGENET_IMAGES[split]:,} of 200")
        keep = chosen(len(samples), getattr(config, f"{split}_images"), split)
        samples = [samples[k] for k in keep]
        images, samples = cached_images(root / "h-imagenet-cache", samples, held, config)
        splits.append((images, torch.tensor([classes.index(name) for _, _, name in samples])))
    return splits, classes


# The 22 of matplotlib's typefaces that draw digits. Whole designs are held out, since a bold or an
# oblique is no new typeface: STIX, a serif; cmss, a sans; cmtt, a typewriter.
TYPEFACES = {
    "train": [f"DejaVu{v}" for v in (
        "Sans Sans-Bold Sans-Oblique Sans-BoldOblique SansMono SansMono-Bold SansMono-Oblique "
        "SansMono-BoldOblique Serif Serif-Bold Serif-Italic Serif-BoldItalic").split()]
    + ["cmr10", "cmb10", "cmti10", "cmmi10"],
    "test": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
    + ["cmss10", "cmtt10"],
}
POSE = {  # the columns of poses, with their lowest and highest value
    "x": (-3, 3),           # the middle of the digit's box, in pixels right of the image's centre
    "y": (-3, 3),           # and below it
    "rotation": (-25, 25),  # degrees, counter-clockwise; small, for 6 and 9 must stay apart
    "scale": (-.4, .3),     # log2 of height / 20 pixels: 15 to 25 pixels
    "shear": (-.3, .3),     # lean to the right a unit of height, beyond the typeface's own
}
CELL, GLYPH = 64, 40  # pixels of a glyph's cell and of its height in it, before it is posed
CHUNK = 100           # images drawn at once, from one seed: image k does not depend on n


def rasterise(names):
    """Every digit of every typeface, all of one height, each in the middle of its cell.

    -> glyphs (f, 10, CELL, CELL), ink in [0, 1];  widths (f, 10), in heights
    """
    from matplotlib import get_data_path
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D
    page, widths = RendererAgg(10 * CELL, len(names) * CELL, dpi=72), torch.empty(len(names), 10)
    pen = page.new_gc()
    pen.set_linewidth(0)
    for f, name in enumerate(names):
        font = FontProperties(fname=str(Path(get_data_path(), "fonts/ttf", f"{name}.ttf")))
        for d in range(10):
            path = TextPath((0, 0), str(d), size=100, prop=font)
            box = path.get_extents()
            place = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
            place.scale(GLYPH / box.height).translate((d + .5) * CELL, (len(names) - f - .5) * CELL)
            page.draw_path(pen, path, place, rgbFace=(0, 0, 0))
            widths[f, d] = box.width / box.height
    ink = torch.frombuffer(page.buffer_rgba(), dtype=torch.uint8)[3::4] / 255  # the alpha channel
    return ink.view(len(names), CELL, 10, CELL).transpose(1, 2).contiguous(), widths


def pose_glyphs(glyphs, poses, size=32):
    """Draw each glyph in its pose.   (b, CELL, CELL), (b, 5) -> ink (b, size, size)"""
    x, y, rotation, scale, shear = poses.unbind(1)                           # each (b,)
    cos, sin = rotation.deg2rad().cos(), rotation.deg2rad().sin()
    # From image to glyph, so backwards: shift, then turn and shear, then divide by the height.
    turn = torch.stack([cos + shear * sin, shear * cos - sin, sin, cos], 1).view(-1, 2, 2)
    shift = turn @ torch.stack([x, y], 1).unsqueeze(2) * (2 / size)          # (b, 2, 1)
    ratio = size / CELL * GLYPH / (20 * 2**scale)
    theta = torch.cat([turn, -shift], 2) * ratio.view(-1, 1, 1)              # (b, 2, 3)
    grid = F.affine_grid(theta, (len(poses), 1, size, size), align_corners=False)
    return F.grid_sample(glyphs.unsqueeze(1), grid, align_corners=False).squeeze(1)


def draw_chunk(glyphs, widths, generator, overlap):
    """CHUNK images; layers l are (left, right, digit), or with overlap (lower digit, upper digit).

    -> images (b, 3, 32, 32) uint8, digits (b, l), poses (b, l, 5)
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(CHUNK, *shape, generator=generator)

    def choose(low, high, *shape):
        return torch.randint(low, high, (CHUNK, *shape), generator=generator)

    layers = 2 if overlap else 3
    label = torch.randperm(CHUNK, generator=generator).unsqueeze(1) % 10      # (b, 1), balanced
    digits = torch.cat([(label + choose(1, 10, layers - 1)) % 10, label], 1)  # neighbours differ
    font = choose(0, len(glyphs), 1)
    poses = torch.stack([uniform(*limits, layers) for limits in POSE.values()], 2)
    tint = uniform(-.15, .15, 1 + layers, 3)                                  # ground first
    if overlap:
        poses[..., 0] += (2 * choose(0, 2, 1) - 1) * torch.tensor([-4, 4])
    else:  # neighbours share pose and ink, stand further along the line, and miss a time in three
        poses, tint[:, 1:] = poses[:, 2:].repeat(1, 3, 1), tint[:, 3:]
        width, height = widths[font, digits], 20 * 2 ** poses[:, :2, 3]       # (b, l), (b, 2)
        step = height * ((width[:, :2] + width[:, 2:]) / 2 + uniform(.08, .3, 2))
        step = torch.where(uniform(0, 1, 2) < 2 / 3, step.clamp(min=10), 99) * torch.tensor([-1, 1])
        poses[:, :2, 0] += step * poses[:, :2, 2].deg2rad().cos()
        poses[:, :2, 1] -= step * poses[:, :2, 2].deg2rad().sin()
    ink = pose_glyphs(glyphs[font, digits].flatten(0, 1), poses.flatten(0, 1))
    ink = ink.view(CHUNK, layers, 1, 32, 32)

    # Two grey levels at least .3 apart, either of them the ink, both tinted.
    contrast = uniform(.3, .7, 1)
    middle = contrast / 2 + uniform(0, 1, 1) * (1 - contrast)
    side = (2 * choose(0, 2, 1) - 1) * torch.tensor([-.5] + layers * [.5])    # (b, 1 + l)
    colour = (middle + contrast * side).unsqueeze(2) + tint - tint.mean(2, keepdim=True)
    # Ground with a gradient and blotches, ink over it, then a camera's blur and noise.
    ramp = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 32)]).T           # (2, 32 * 32)
    image = (uniform(-.1, .1, 1, 2) @ ramp).view(CHUNK, 1, 32, 32) + colour[:, 0, :, None, None]
    image = image + F.interpolate(uniform(-.08, .08, 3, 5, 5), size=(32, 32), mode="bilinear")
    for k in range(layers):
        image = image.lerp(colour[:, 1 + k, :, None, None], ink[:, k])
    blurred = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    image = image.lerp(blurred, uniform(0, 1, 1, 1, 1))
    image += uniform(.01, .06, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().byte(), digits, poses


def draw_digits(n, train=True, seed=0, overlap=False):
    """n images of printed digits; the test split is in typefaces that training never shows.

    -> images (n, 3, 32, 32) uint8, labels (n,), poses (n, 5) with the columns of POSE
    overlap=True: two different digits, one over the other, and no neighbours;
    labels (n, 2) and poses (n, 2, 5), the upper one first.
    """
    split, chunks = "train" if train else "test", []
    glyphs, widths = rasterise(TYPEFACES[split])
    for c in range(0, max(n, 1), CHUNK):
        mixed = random.Random(f"{split} {seed} {overlap} {c}").getrandbits(32)
        chunks.append(draw_chunk(glyphs, widths, torch.Generator().manual_seed(mixed), overlap))
    images, digits, poses = (torch.cat(part)[:n] for part in zip(*chunks, strict=True))
    if overlap:
        return images, digits.flip(1), poses.flip(1)
    return images, digits[:, -1], poses[:, -1]


class Source(NamedTuple):
    """A data set: how to read it, the side of its images, whether a mirror image is as good."""

    load: callable
    side: int
    flips: bool
    note: str


DATASETS = {
    "digits": Source(load_digits, 32, False, "printed digits like SVHN's, drawn on the fly"),
    "mnist": Source(load_torchvision, 32, False, "60,000 + 10,000 grey digits, padded to 32x32"),
    "fashion-mnist": Source(load_torchvision, 32, True, "60,000 + 10,000 grey clothes, padded"),
    "cifar10": Source(load_torchvision, 32, True, "50,000 + 10,000 photographs of 10 kinds"),
    "cifar100": Source(load_torchvision, 32, True, "50,000 + 10,000 photographs of 100 kinds"),
    "svhn": Source(load_torchvision, 32, False, "73,257 + 26,032 house numbers"),
    "folder": Source(load_folder, 32, True, "your images: DIR/{train,test}/CLASS/*.jpg"),
    "h-imagenet": Source(load_h_imagenet, 128, True, "the paper's 200 hard classes of ImageNet"),
    "imagenet": Source(load_folder, 224, True, "ImageNet: DIR/{train,val}/WNID/*.JPEG"),
}


def load_data(config, device):
    """The data set of a Config; rank 0 first, which may download.  The last is kept."""
    fields = ("dataset", "data_path", "image_size", "train_images", "test_images", "class_list",
              "unreadable")
    with rank_by_rank():
        return read_data(device, config.augment != "none", *(getattr(config, f) for f in fields))


@functools.lru_cache(maxsize=1)
def read_data(device, augmented, dataset, data_path, side, train_images, test_images, class_list,
              unreadable):
    config = Config(dataset, data_path, side, train_images, test_images, class_list=class_list,
                    unreadable=unreadable)
    held = enlarged(side) if augmented or dataset in ("imagenet", "h-imagenet") else side
    splits, classes = DATASETS[dataset].load(config, held)
    halves = []
    for images, labels in splits:
        if isinstance(images, Tensor) and images.shape[-1] != held:
            images = fit_side(fit_side(images, side), held)
        if isinstance(images, Tensor) and images.nbytes <= HELD_BYTES:
            images = images.contiguous().to(device)
        halves.append(Split(images, labels.to(device)))
    mean, std = channel_moments(halves[0], device)
    return Data(data_name(config), classes, *halves, side, mean, std)


def channel_moments(split, device):
    """Mean and deviation of each channel of training images in [0, 1]; of 2,000 of a big set."""
    every = 1 if isinstance(split.images, Tensor) else math.ceil(len(split) / 2000)
    chunks = torch.arange(0, len(split), every, device=device).split(500)
    totals = [torch.stack([torch.ones_like(x.mean((0, 2, 3))) * x[:, 0].numel(), x.sum((0, 2, 3)),
                           x.square().sum((0, 2, 3))]).cpu()
              for images, _, _ in split.batches(chunks, device) for x in [(images.float() / 255)]]
    n, total, square = torch.stack(totals).double().sum(0)
    mean = total / n
    std = (square / n - mean ** 2).clamp(min=0).sqrt()
    return mean.float().to(device), std.clamp(min=1e-3).float().to(device)


# ------------------------------------------------------------------------------------------------
# Augmentation, a function of (seed, epoch, image), vectorised on the device   [App. C]
# ------------------------------------------------------------------------------------------------


def shuffle(n, seed, epoch):
    """The order of an epoch (n,) and seven uniform numbers an image (n, 7)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator), torch.rand(n, 7, generator=generator)


def crop(images, top, left, side, mirror=None):
    """Cut (B, C, side, side) out of (B, C, R, R), each at its place, mirrored or not (B,)."""
    steps = torch.arange(side, device=images.device)
    rows, columns = top[:, None] + steps, left[:, None] + steps          # (B, side)
    if mirror is not None:
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
    b = torch.arange(len(images), device=images.device)[:, None, None]
    return images[b, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def blend(x, y, factor):
    """torchvision's: factor 1 is x, 0 is y, clamped to [0, 1].   factor (B,)"""
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * y).clamp(0, 1)


def grey(x):
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def shift_hue(x, turns):
    """Turn the hue of (B, 3, H, W), by way of (hue, value, chroma); turns (B,)."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    width = torch.where(chroma > 0, chroma, 1)
    sextant = torch.where(value == red, (green - blue) / width, torch.where(
        value == green, 2 + (blue - red) / width, 4 + (red - green) / width))
    k = x.new_tensor([5, 3, 1]).view(3, 1, 1) + (sextant + 6 * turns.view(-1, 1, 1))[:, None]
    k = k % 6                                                            # (B, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def colour_jitter(x, brightness, contrast, saturation, hue):
    """Images in [0, 1] and one factor (B,) an image each, applied in this order."""
    x = blend(x, torch.zeros_like(x), brightness)
    x = blend(x, grey(x).mean((1, 2, 3), keepdim=True), contrast)
    if x.shape[1] == 1:                                   # grey has no colour to change
        return x
    return shift_hue(blend(x, grey(x), saturation), hue)


def augmented(images, draws, side, augment, flip):
    """Images (B, C, R, R) uint8 and draws (B, 7) in [0, 1) -> (B, C, side, side) in [0, 1]."""
    room = images.shape[-1] - side
    place = (draws[:, :2] * (room + 1)).long()                           # anywhere
    if augment == "none":
        place = torch.full_like(place, room // 2)                        # the centre
    if room or flip:
        images = crop(images, place[:, 0], place[:, 1], side, draws[:, 2] < 0.5 if flip else None)
    x = images.float() / 255
    if augment != "++":
        return x
    spread = 0.2 * (2 * draws[:, 3:] - 1)                                # uniform in [-0.2, 0.2]
    return colour_jitter(x, *(1 + spread[:, :3]).unbind(1), spread[:, 3])


def test_views(images, side, multi_crop, mirror):
    """The crops of test images: the centre alone, or with the four corners, and mirrored too."""
    room = images.shape[-1] - side
    places = [(room // 2, room // 2)]
    if multi_crop and room:
        places += [(0, 0), (0, room), (room, 0), (room, room)]
    for top, left in places:
        x = images[..., top:top + side, left:left + side].float() / 255
        yield x
        if multi_crop and mirror:
            yield x.flip(-1)


def normalised(x, data):
    return (x - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)


# ------------------------------------------------------------------------------------------------
# Devices and processes
# ------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def rank_by_rank():
    """Rank 0 does the block first, the others after it."""
    if world() > 1 and rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()


def pick_device(name):
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Problem(f"--device {name}: {reason(error)}") from error


def restarts():
    """How often torchrun has started us again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join_processes(backend):
    """init_process_group, but a restart does not find the addresses of the processes before it."""
    from torch.distributed.rendezvous import rendezvous
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"start-{restarts()}", store),
                            rank=rank,
                            world_size=world)


def start(config):
    """Device and process group of a run -> device."""
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        tf32 = not config.deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():         # torchrun started us
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if config.batch_size % world():
        raise Problem(f"--batch-size {config.batch_size} does not divide among {world()} processes")
    return device


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)


class AllReduceBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes; SyncBatchNorm does not run on a CPU."""

    def forward(self, x):
        if not self.training or world() == 1:
            return super().forward(x)
        n = world() * x[:, 0].numel()
        mean = SumOverProcesses.apply(x.sum((0, 2, 3))) / n                          # (C,)
        centred = x - mean.view(-1, 1, 1)
        var = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / max(1, n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def synchronised(net, device):
    """The network with BatchNorm over all processes; names of weights stay."""
    if world() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if world() > 1 and type(module) is nn.BatchNorm2d:
            module.__class__ = AllReduceBatchNorm
    return net


def wrapped(net, config, device):
    """What is called in training: net, distributed and compiled as asked."""
    model = net
    if world() > 1:
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)
    return torch.compile(model) if config.compile else model


def agreed(number):
    """The largest number any process brings: one that is to stop stops all on the same step."""
    if world() == 1:
        return number
    ballot = torch.tensor(number)
    dist.all_reduce(ballot, dist.ReduceOp.MAX)
    return int(ballot)


# ------------------------------------------------------------------------------------------------
# One step, one epoch, evaluation
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """Everything about a training run; what a checkpoint holds is below the line."""

    config: Config
    data: Data
    device: torch.device
    net: nn.Module                 # the network
    model: nn.Module               # the network as called in training: distributed, compiled
    optimizer: torch.optim.Optimizer
    header: dict                   # first line of the log
    folder: Path = None
    signals: list = ()             # caught, to act on after the step
    saved: float = 0.0             # when
    # --------------------------------------------------------------------------------------------
    epoch: int = 0                 # completed
    step: int = 0                  # completed in this epoch
    totals: Tensor = None          # sums over steps: 1, loss, feedback, part of wrong answers
    history: list = dataclasses.field(default_factory=list)     # an entry an epoch
    seconds: float = 0.0           # spent on it so far
    moments: list = dataclasses.field(default_factory=list)     # Figure 2's, of routed networks

    @property
    def batch(self):
        n = min(self.config.batch_size, len(self.data.train))
        return n - n % world()

    @property
    def steps(self):
        """Steps of an epoch; the few images left over are others in the next one."""
        return len(self.data.train) // self.batch

    @property
    def progress(self):
        return (self.epoch + self.step / self.steps) / max(1, self.config.epochs)


def learning_rate(config, epoch, progress):
    """Of a step in this epoch, at this part in [0, 1) of the run."""
    if config.schedule == "steps":
        return config.lr * config.gamma ** sum(epoch >= m for m in config.milestones)
    rise = 0.2                                            # one cycle: up a line, down a cosine
    if progress < rise:
        return config.lr * (0.04 + 0.96 * progress / rise)
    return config.lr * max(1e-3, 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise)))


def make_optimizer(config, parameters, device):
    fused = {"fused": True} if device.type in ("cuda", "cpu") else {}
    return {
        "adam": lambda p, **kw: torch.optim.Adam(p, betas=(0.9, 0.999), **fused, **kw),
        "rmsprop": torch.optim.RMSprop,
        "sgd": lambda p, **kw: torch.optim.SGD(p, momentum=0.9, **fused, **kw),
    }[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)


def classification_loss(config, scores, labels, progress):
    """margin, spread (m annealed 0.2 -> 0.9, or fixed) or cross entropy, mean over the batch."""
    if config.loss == "ce":
        return F.cross_entropy(scores, labels)
    if config.loss == "margin":
        return encapnet.margin_loss(scores, labels)
    margin = 0.9 if config.loss == "spread-fixed" else 0.2 + 0.7 * progress
    return encapnet.spread_loss(scores, labels, margin)


def call(model, config, x):
    """The model under the Config's precision and memory format."""
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        scores, feedback = model(x)
    return scores.float(), feedback.float()


def train_step(run, images, labels, draws, tick=lambda part: None):
    """One update -> loss, feedback divergence and wrong answers of this batch, on the device.

    tick("data"), then "forward", "backward", "optimizer": called after each part, for --bench
    """
    config = run.config
    x = normalised(augmented(images, draws, run.data.side, config.augment, config.flip), run.data)
    tick("data")
    scores, feedback = call(run.model, config, x)
    loss = classification_loss(config, scores, labels, run.progress)
    tick("forward")
    run.optimizer.zero_grad(set_to_none=True)
    (loss + config.lam * feedback).backward()
    tick("backward")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.epoch, run.progress)
    run.optimizer.step()
    tick("optimizer")
    return loss.detach(), feedback.detach(), (scores.detach().argmax(1) != labels).sum()


def train_epoch(run, bar):
    """From where the run stands to the end of the epoch; saves now and then, stops on a signal."""
    config, split = run.config, run.data.train
    order, draws = (t.to(run.device) for t in shuffle(len(split), config.seed, run.epoch))
    chunks = [order[k * run.batch:(k + 1) * run.batch][rank()::world()] for k in range(run.steps)]
    bad = torch.full((2,), -1, device=run.device)         # first step with a bad loss, feedback
    run.net.train()
    for images, labels, index in split.batches(chunks[run.step:], run.device, config.workers):
        loss, feedback, wrong = train_step(run, images, labels, draws[index])
        run.step += 1
        values = torch.stack([loss, feedback])
        bad = torch.where((bad < 0) & ~values.isfinite(), run.step, bad)
        run.totals[0] += 1
        run.totals[1:] += torch.cat([values, wrong[None] / len(labels)])
        if run.step % config.print_freq == 0 or run.step == run.steps:
            check_finite(run, bad)
            bar.show(run)
        caught = agreed(run.signals[0] if run.signals else int(due(run)))
        if caught:
            save(run, bad)
        if caught > 1:
            raise Problem(f"stopped by {signal.Signals(caught).name} in epoch {run.epoch + 1}, "
                          f"after step {run.step}"
                          f"; go on with: python train.py --resume {run.folder}", 128 + caught)


def check_finite(run, bad=None):
    """Stop before a NaN reaches a checkpoint, and name the step and the culprit."""
    names = ("the loss", "the feedback")
    losses = {} if bad is None else dict(zip(names, bad.tolist(), strict=True))
    losses = {name: step for name, step in losses.items() if step >= 0}
    where = f"epoch {run.epoch + 1}, step"
    hint = f"the last good checkpoint is in {run.folder}; a smaller --lr may help"
    state = {name: t for name, t in run.net.state_dict().items() if t.is_floating_point()}
    finite = torch.stack([t.isfinite().all() for t in state.values()])
    if losses and len(set(losses.values())) == len(losses):
        culprit = min(losses, key=losses.get)
        raise Diverged(f"{where} {losses[culprit]}: {culprit} is not finite; {hint}", 1)
    if losses or not finite.all():
        name = next((n for n, ok in zip(state, finite.tolist(), strict=True) if not ok),
                    "loss and feedback")
        step = min(losses.values(), default=run.step)
        raise Diverged(f"{where} {step}: {name} is not finite; {hint}", 1)


@torch.no_grad()
def evaluate(run, multi_crop=False):
    """Errors in % over the whole test set, each image counted once however many the processes.

    -> {"error": top-1, "top5_error":, "images": their number}
    """
    data, mirror = run.data, DATASETS[run.config.dataset].flips
    mine = torch.arange(rank(), len(data.test), world(), device=run.device)
    hits = torch.zeros(3, dtype=torch.long, device=run.device)           # top-1, top-5, images
    run.net.eval()
    chunks = mine.split(run.config.batch_size)
    for images, labels, _ in data.test.batches(chunks, run.device, run.config.workers):
        views = [normalised(x, data) for x in test_views(images, data.side, multi_crop, mirror)]
        scores = [call(run.net, run.config, x)[0] for x in views]
        scores = sum(s.softmax(1) if run.net.logits else s for s in scores)
        right = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum(), torch.ones_like(labels).sum()])
    if world() > 1:
        dist.all_reduce(hits)
    top1, top5, n = hits.tolist()
    return {"error": 100 * (n - top1) / n, "top5_error": 100 * (n - top5) / n, "images": n}


@torch.no_grad()
def agreement(net, x, labels, bins=20):
    """Cosine of the true class's capsule v_j and its votes, in the last routed layer.   [Fig. 2]

    -> {"percent": of the votes in each of `bins` bins over [-1, 1], "length": their mean length}
    """
    seen = []
    hook = net.routed[-1].register_forward_hook(
        lambda layer, given, out: seen.append((given[0], out)))
    net.eval()(x)
    hook.remove()
    u, v = seen[0][0], seen[0][1] if isinstance(seen[0][1], Tensor) else seen[0][1][0]
    b = torch.arange(len(x), device=x.device)
    votes = net.routed[-1].votes(u)[b, :, labels]                        # (B, i, d)
    cosine = F.cosine_similarity(votes, v[b, labels].unsqueeze(1), dim=-1)            # (B, i)
    place = ((cosine + 1) / 2 * bins).long().clamp(0, bins - 1).flatten().cpu()
    count = torch.bincount(place, minlength=bins).double()
    length = torch.bincount(place, votes.norm(dim=-1).flatten().double().cpu(), minlength=bins)
    return {"percent": (100 * count / count.sum()).tolist(),
            "length": (length / count.clamp(min=1)).tolist()}


class Bar:
    """Progress: a tqdm bar an epoch on a terminal, otherwise one plain line an epoch."""

    def __init__(self, run):
        self.bar, self.since, self.first = None, time.time(), run.step
        if rank() == 0 and sys.stdout.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=run.steps, initial=run.step, leave=False, file=sys.stdout,
                            desc=f"epoch {run.epoch + 1}/{run.config.epochs}")

    def show(self, run):
        if self.bar is not None:
            n, loss, feedback, wrong = run.totals.tolist()
            self.bar.set_postfix_str(f"loss {loss / n:.4f}, feedback {feedback / n:.4f}, "
                                     f"error {100 * wrong / n:.1f} %")
            self.bar.update(run.step - self.bar.n)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def clock(seconds):
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}h{rest // 60:02}m" if hours else f"{rest // 60}m{rest % 60:02}s"


# ------------------------------------------------------------------------------------------------
# Save and resume
# ------------------------------------------------------------------------------------------------

SAVED = ("epoch", "step", "totals", "history", "seconds", "moments", "header")


def write_file(path, content, keep=None):
    """Replace path by content or leave it as it was, come what may; the old goes to `keep`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Problem(f"cannot write {path}: {error.strerror}; what was saved before is intact",
                      1) from error


def due(run):
    return time.time() - run.saved >= run.config.save_every


def average_totals(run):
    """The epoch's sums so far, as a mean over the processes."""
    if world() > 1:
        dist.all_reduce(run.totals)
        run.totals /= world()


def save(run, bad=None):
    """Write the checkpoint unless it holds a NaN; keep the last one.  All processes call it."""
    average_totals(run)
    if rank() == 0:
        check_finite(run, bad)
        data = run.data
        state = {"config": {**dataclasses.asdict(run.config), "resume": None},
                 "data": {"name": data.name, "classes": data.classes, "mean": data.mean.cpu(),
                          "std": data.std.cpu()},
                 "net": run.net.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "rng": torch.get_rng_state(), **{name: getattr(run, name) for name in SAVED}}
        if run.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(run.device)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(run.folder / "last.pt", buffer.getvalue(), keep=run.folder / "previous.pt")
    run.saved = time.time()


def read_checkpoint(path):
    """A checkpoint's contents, every byte checked, nothing executed."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        needed = {"config", "data", "net", "optimizer", *SAVED}
        if not isinstance(state, dict) or not needed <= set(state):
            raise ValueError("not written by train.py")
        Config(**state["config"])
        return state
    except FileNotFoundError:
        raise Problem(f"no checkpoint {path}") from None
    except pickle.UnpicklingError:
        raise Problem(f"{path} is refused: it holds more than tensors and plain values") from None
    except Exception as error:                            # a damaged file can raise anything
        raise Problem(f"{path} is damaged or not train.py's ({reason(error)})") from error


def run_folder(path):
    """The folder that --resume PATH means: itself, or the one of its last.pt."""
    path = Path(path)
    return path.parent if path.name in ("last.pt", "previous.pt") else path


def load_checkpoint(path, mend=False):
    """last.pt of a run's folder, or if that is damaged the one before, and says so; or any file.

    mend: put a damaged last.pt aside, lest the next save make it previous.pt
    """
    path, folder = Path(path), run_folder(path)
    if not folder.is_dir():
        return read_checkpoint(path)
    complaints = []
    for name in ("last.pt", "previous.pt"):
        if (folder / name).exists():
            try:
                state = read_checkpoint(folder / name)
                if complaints:
                    say(f"{complaints[0]}: using {folder / name}, of epoch {state['epoch']}, "
                        f"step {state['step']}")
                if complaints and mend and rank() == 0:
                    os.replace(folder / "last.pt", folder / "last.damaged")
                return state
            except Problem as problem:
                complaints.append(str(problem))
    raise Problem("; ".join(complaints) or f"no checkpoint (last.pt) in {folder}")


def check_same(config, state):
    """Refuse to resume a checkpoint of another configuration, and name the fields."""
    ours, theirs = identity(config), identity(Config(**state["config"]))
    theirs["dataset"] = state["data"]["name"]
    changed = [f"{name} {theirs[name]!r} -> {ours[name]!r}" for name in ours
               if ours[name] != theirs[name]]
    then, now = state["config"]["epochs"], config.epochs
    if now < state["epoch"] or (now != then and config.schedule == "one-cycle"):
        changed.append(f"epochs {then!r} -> {now!r}")
    if changed:
        raise Problem(f"{run_folder(config.resume)} was trained otherwise ({'; '.join(changed)}); "
                      "only --epochs may grow, with --schedule steps")


def restore(run, state):
    """Bring a fresh run to where a checkpoint of the same configuration left off."""
    check_same(run.config, state)
    try:
        if state["data"]["classes"] != run.data.classes:
            raise ValueError("other classes")
        run.net.load_state_dict(plain_names(state["net"]))
        run.optimizer.load_state_dict(state["optimizer"])
        for name in SAVED:
            setattr(run, name, state[name])
        run.totals = run.totals.to(run.device)
        run.header["config"]["epochs"] = run.config.epochs
        torch.set_rng_state(state["rng"])
        if run.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{run.folder}: the checkpoint does not fit ({reason(error)})") from error


def plain_names(state):
    """Weights saved from a compiled or distributed model under the names of the plain one."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): t for name, t in state.items()}


def write_log(run, *more):
    """log.jsonl anew, header and an entry an epoch: replaced whole, so readable after any kill."""
    if rank() == 0:
        lines = [run.header, *run.history, *more]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_file(run.folder / "log.jsonl", text.encode())


@contextlib.contextmanager
def locked(folder):
    """Refuse a folder that another process works in; the kernel unlocks when that one dies."""
    if rank() > 0:
        yield
        return
    try:
        import fcntl
    except ImportError:                                   # Windows: no lock
        fcntl = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise Problem(f"--output-dir {folder}: {error.strerror}") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Problem(f"{folder} is in use by another run") from None
        yield


@contextlib.contextmanager
def caught_signals():
    """SIGTERM and SIGINT collect in a list instead of killing; another a second later does kill."""
    signals, first = [], []

    def handler(number, frame):
        if signals and time.time() - first[0] > 1:        # torchrun repeats what a terminal sent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first.append(time.time())
        signals.append(number)

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:                                    # not the main thread
        before = {}
    try:
        yield signals
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def newest(wanted, finished=False):
    """The newest run in runs/ whose Config has the wanted fields, finished or not as asked."""
    for log in sorted(RUNS.glob("*/log.jsonl"), key=lambda p: p.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            config = json.loads(log.read_text().partition("\n")[0])["config"]
            same = all(config[k] == v for k, v in json.loads(json.dumps(wanted)).items())
            if same and (finished or not (log.parent / "result.json").exists()):
                return log.parent
    return None


def check_free(folder):
    """Refuse to start anew where a run is."""
    if (folder / "result.json").exists():
        raise Problem(f"{folder} holds a finished run: choose another --output-dir, or train on: "
                      f"--resume {folder} --epochs N")
    if (folder / "last.pt").exists() or (folder / "previous.pt").exists():
        raise Problem(f"{folder} holds an unfinished run: go on with --resume {folder}, or choose "
                      "another --output-dir")


def numbered_folder(config):
    """The next free one of runs/DATASET-MODEL-0, -1, ..."""
    for k in itertools.count():
        folder = RUNS / f"{data_name(config)}-{config.model}-{k}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


# ------------------------------------------------------------------------------------------------
# fit: a Config in, a result out
# ------------------------------------------------------------------------------------------------


def environment(device):
    """What a result depends on besides its Config."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type.upper()}, {torch.get_num_threads()} threads"
    return {"device": name, "processes": world(), "torch": str(torch.__version__),
            "python": platform.python_version(),
            "commit": git.stdout.strip() or None,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])}


def build_run(config, data, device):
    """A network with all that its training needs, before the first step."""
    torch.manual_seed(config.seed)
    net = make_model(config, len(data.classes), data.channels).to(device)
    if config.channels_last and device.type == "cpu" and any(
            isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)
            and m.in_channels < 8 for m in net.modules()):
        say("--channels-last: off, torch 2.15 crashes in this network's narrow strided 1x1 "
            "convolutions on a CPU")
        config = dataclasses.replace(config, channels_last=False)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)
    net = synchronised(net, device)
    optimizer = make_optimizer(config, net.parameters(), device)
    double = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.zeros(4, dtype=double, device=device)
    header = {"config": dataclasses.asdict(config), "environment": environment(device)}
    return Run(config, data, device, net, wrapped(net, config, device), optimizer, header,
               totals=totals)


def begin(run):
    """Bring a run to its start, or to where its checkpoint left it."""
    if run.config.resume:
        restore(run, load_checkpoint(run.config.resume, mend=True))
        if rank() == 0 and run.epoch < run.config.epochs:
            (run.folder / "result.json").unlink(missing_ok=True)
        say(f"{run.folder}: going on after epoch {run.epoch}, step {run.step}")
    else:
        look_at_routing(run)
        save(run)
    run.saved = time.time()
    write_log(run)


def look_at_routing(run):
    """Record the agreement of votes before training, after 10 %, 40 % and all of it.   [Fig. 2]"""
    moments = {math.ceil(part * run.config.epochs) for part in (0, 0.1, 0.4, 1)}
    if hasattr(run.net, "routed") and run.epoch in moments:
        index = torch.arange(min(64, len(run.data.test)), device=run.device)
        images, labels, _ = next(run.data.test.batches([index], run.device))
        x = normalised(next(test_views(images, run.data.side, False, False)), run.data)
        run.moments.append({"epoch": run.epoch, **agreement(run.net, x, labels)})


def introduce(run):
    data, config = run.data, run.config
    weights = sum(p.numel() for p in run.net.parameters())
    say(f"{data.name}: {len(data.train):,} + {len(data.test):,} images, {len(data.classes)} "
        f"classes; {config.model}: {weights:,} parameters; {config.epochs} epochs, "
        f"recipe {config.recipe}, on {environment(run.device)['device']}; {run.folder}")


def finish_epoch(run, since, images):
    """Test, log, print."""
    average_totals(run)
    n, loss, feedback, wrong = run.totals.tolist()
    test = evaluate(run)
    lr = run.optimizer.param_groups[0]["lr"]
    run.seconds += time.time() - since
    run.epoch, run.step = run.epoch + 1, 0
    run.totals.zero_()
    entry = {"epoch": run.epoch, "lr": lr, "loss": loss / n, "feedback": feedback / n,
             "train_error": 100 * wrong / n, "test_error": test["error"],
             "test_top5_error": test["top5_error"],
             "time": {"seconds": run.seconds, "images_per_second": images}}
    run.history.append(entry)
    look_at_routing(run)
    left = run.seconds / run.epoch * (run.config.epochs - run.epoch)
    say(f"epoch {run.epoch:3}/{run.config.epochs}  loss {loss / n:.4f}  "
        f"feedback {feedback / n:.4f}  "
        f"error: train {entry['train_error']:5.2f} %  test {entry['test_error']:5.2f} %  "
        f"{images:,.0f} images/s  {clock(left)} left")
    if agreed(int(run.epoch == run.config.epochs or due(run))):
        save(run)
    write_log(run)


def finish(run):
    """The result of a finished run, recorded in its folder and in runs/results.jsonl."""
    config, last = run.config, (run.history or [{}])[-1]
    multi_crop = config.augment != "none"
    test = evaluate(run, multi_crop)
    chance = 100 * (1 - 1 / len(run.data.classes))
    best = min(run.history, key=lambda e: e["test_error"], default={})
    result = {
        "data": run.data.name, "model": config.model, "recipe": config.recipe, "seed": config.seed,
        "epochs": config.epochs, "key": config_key(config), "outcome": "ok", **test,
        "multi_crop": multi_crop,
        **{name: last.get(name) for name in ("train_error", "loss", "feedback")},
        "best_by_test_error": {k: best.get(k) for k in ("epoch", "test_error")},
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "seconds": round(run.seconds, 1),
        "folder": str(run.folder), "config": run.header["config"] | {"epochs": config.epochs},
        "environment": run.header["environment"],
        "curves": {k: [e[k] for e in run.history]
                   for k in ("loss", "feedback", "train_error", "test_error")},
        "moments": run.moments, "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if last and last["train_error"] > 0.95 * chance:
        result["outcome"] = "at chance"
    if rank() == 0:
        draw_run(run)
        record(result)
        write_file(run.folder / "result.json", json.dumps(result, indent=1).encode())
    return result


def record(result):
    """One line to runs/results.jsonl, after a line that a kill left torn if there is one."""
    RUNS.mkdir(exist_ok=True)
    file = RUNS / "results.jsonl"
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with open(file, "a") as lines:
        lines.write("\n" * torn + json.dumps(result) + "\n")


def shared(value):
    """Rank 0's value, on every process."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def fit(config):
    """Train as the Config says, from the start or from config.resume -> the result, plain types."""
    device = start(config)
    if restarts() and not config.resume:
        before = newest(identity_fields(config)) if not config.output_dir else \
            config.output_dir if Path(config.output_dir, "last.pt").exists() else None
        config = dataclasses.replace(config, resume=shared(before and str(before)))
    if config.output_dir and not config.resume and rank() == 0:
        check_free(Path(config.output_dir))
    run = build_run(config, load_data(config, device), device)
    folder = config.resume or config.output_dir or shared(
        str(numbered_folder(config)) if rank() == 0 else None)
    run.folder = folder = run_folder(folder)
    with locked(folder), caught_signals() as run.signals:
        begin(run)
        if config.resume and (folder / "result.json").exists():
            say(f"{folder} is already finished")
            return json.loads((folder / "result.json").read_text())
        introduce(run)
        while run.epoch < config.epochs:
            since, first, bar = time.time(), run.step, Bar(run)
            try:
                train_epoch(run, bar)
            finally:
                bar.close()
            speed = (run.steps - first) * run.batch / max(1e-9, time.time() - since)
            finish_epoch(run, since, speed)
        return finish(run)


def identity_fields(config):
    """The fields that must agree for a run to be this run."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)
            if not f.metadata["free"]}


# ------------------------------------------------------------------------------------------------
# The paper's tables as data: rows are changes to Config
# ------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A table or a block of it: base, columns and rows are changes to Config, a cell all three."""

    title: str
    base: dict
    columns: dict          # name: changes
    rows: list             # (name, changes, {column: the paper's error in %});  None: quoted there
    own_data: bool = False           # stays on its data set when --dataset asks for another


def use(name, **keywords):
    return dict(model=name, set=keywords)


CIFAR10, MNIST = dict(dataset="cifar10"), dict(dataset="mnist")
SETS = ("cifar10", "cifar100", "svhn")
DEEP = dict(feedback=0, coefficients="both", skip="both")    # Table 3's EncapNet without a unit

TABLES = {
    1: [Part("six-layer networks", {}, {"CIFAR-10": CIFAR10, "MNIST": MNIST}, [
        # "cost": the paper's Mb of parameters, MB of memory at this batch, s a batch on a Titan X
        ("(a) CapNet, dynamic", use("capnet-dynamic"),
         {"CIFAR-10": 14.28, "MNIST": 0.37, "cost": (151.24, 3961, 8, 0.444)}),
        ("(b) CapNet, EM", use("capnet-em"),
         {"CIFAR-10": 12.66, "MNIST": 0.31, "cost": (152.44, 10078, 4, 0.957)}),
        ("(c) vanilla CNN, same shape", use("cnn-same"),
         {"CIFAR-10": 14.43, "MNIST": 0.38, "cost": (24.44, 1652, 128, 0.026)}),
        ("(d) vanilla CNN, similar param", use("cnn-similar"),
         {"CIFAR-10": 12.09, "MNIST": 0.33, "cost": (146.88, 2420, 128, 0.146)}),
        ("(e) EncapNet, master", use("encapnet6-master"),
         {"CIFAR-10": 13.87, "MNIST": 0.31, "cost": (25.76, 1433, 128, 0.039)}),
        ("(f) EncapNet, master/aide", use("encapnet6"),
         {"CIFAR-10": 11.93, "MNIST": 0.25, "cost": (60.68, 1755, 128, 0.061)}),
    ])],
    3: [Part("capConv design", CIFAR10, {"EncapNet": use("encapnet")}, [
        ("(1) master (baseline)", dict(set=dict(DEEP, coefficients=None, skip=None)),
         {"EncapNet": 9.83}),
        ("(2) master/aide v1", dict(set=dict(DEEP, coefficients="own", skip=None)),
         {"EncapNet": 8.05}),
        ("(3) master/aide v2", dict(set=dict(DEEP, coefficients="cross", skip=None)),
         {"EncapNet": 9.11}),
        ("(4) master/aide v3", dict(set=dict(DEEP, skip=None)), {"EncapNet": 7.41}),
        ("(5) skip on Type I", dict(set=dict(DEEP, skip="I")), {"EncapNet": 6.81}),
        ("(6) skip on Type II", dict(set=dict(DEEP, skip="II")), {"EncapNet": 6.75}),
        ("(7) skip both", dict(set=DEEP), {"EncapNet": 5.82}),
        ("(8) two OTs", dict(set=dict(DEEP, feedback=2)), {"EncapNet": 4.55}),
    ]), Part("regularization", CIFAR10,
             {"EncapNet": use("encapnet", **DEEP), "ResNet": use("resnet18")}, [
        ("(a) capConv block (baseline)", dict(set=dict(feedback=0)),
         {"EncapNet": 5.82, "ResNet": 8.03}),
        ("(b) KL loss", dict(set=dict(feedback=1, divergence="kl")),
         {"EncapNet": 5.31, "ResNet": 7.72}),
        ("(c) OT loss", dict(set=dict(feedback=1)), {"EncapNet": 4.58, "ResNet": 7.67}),
        ("(d1) remove bias fix", dict(set=dict(feedback=1, bias_fix=False)), {"EncapNet": 4.71}),
        ("(d2) do BP in P_L", dict(set=dict(feedback=1, plan_grad=True)), {"EncapNet": 4.77}),
        ("(d3) no extractor", dict(set=dict(feedback=1, extractor=False)), {"EncapNet": 5.79}),
        ("(d4) use vanilla g", dict(set=dict(feedback=1, generator="vanilla")), {"EncapNet": 5.01}),
        ("(d5) use l2 in Q", dict(set=dict(feedback=1, cost="l2")), {"EncapNet": 4.90}),
    ]), Part("what the paper leaves open, beside (7) and (c); not in the paper", CIFAR10,
             {"EncapNet": use("encapnet", **DEEP)}, [
        *((f"aide kernel {k}", dict(set=dict(aide_kernel=k)), {"EncapNet": "–"})
          for k in (1, 5, 7)),
        ("squash in each branch", dict(set=dict(squash_branches=True)), {"EncapNet": "–"}),
        *((f"OT loss, lambda {lam:g}", dict(lam=lam, set=dict(feedback=1)), {"EncapNet": "–"})
          for lam in (0.1, 1.0, 10.0)),
    ])],
    4: [Part("comparison; the paper's mean ± std: ++ on CIFAR-10 3.56 ± 0.12 and SVHN 1.87 ± 0.11, "
             "+ on "
             "CIFAR-100 24.85 ± 0.11", use("encapnet"),
             {name: dict(dataset=name) for name in SETS},
             [(f"EncapNet{a}", dict(augment=a or "none"), dict(zip(SETS, p, strict=True)))
              for a, *p in (("", 4.55, 26.77, 2.01), ("+", 3.13, 24.01, 1.64),
                            ("++", 3.10, 24.18, 1.52))]
             + [(name, None, dict(zip(SETS, p, strict=True))) for name, *p in (
                 ("GoodInit", 5.84, 27.66, None), ("BayesNet", 6.37, 27.40, None),
                 ("ResNet", 6.43, None, None),
                 ("ELU", 6.55, 24.28, None), ("Batch NIN", 6.75, 28.86, 1.81),
                 ("Rec-CNN", 7.09, 31.75, 1.77),
                 ("Piecewise", 7.51, 30.83, None), ("DSN", 8.22, 34.57, 1.92),
                 ("NIN", 8.80, 35.68, 2.35),
                 ("dasNet", 9.22, 33.78, None), ("Maxout", 9.35, 38.57, 2.47),
                 ("AlexNet", 11.00, None, None))]),
        Part("h-ImageNet, top-1", dict(dataset="h-imagenet"), {"h-ImageNet": {}}, [
            (name, dict(model=model, image_size=side, augment=augment), {"h-ImageNet": error})
            for name, model, side, augment, error in (
                ("EncapNet v1", "encapnet", 128, "none", 48.23),
                ("EncapNet v2", "encapnet-v2", 128, "none", 43.15),
                ("EncapNet v3", "encapnet-v3", 224, "none", 42.76),
                ("EncapNet v3+", "encapnet-v3", 224, "+", 40.18),
                ("EncapNet v3++", "encapnet-v3", 224, "++", 40.05),
                ("WRN", "wide_resnet101_2", 224, "++", 42.51),
                ("ResNet-101", "resnet101", 224, "++", 44.13), ("VGG", "vgg16", 224, "++", 55.76),
                ("GoogleNet", "googlenet", 224, "++", 60.18))], own_data=True),
        Part("complete ImageNet, top-5", dict(dataset="imagenet", augment="++"), {"ImageNet": {}}, [
            (name, use(model), {"ImageNet": error}) for name, model, error in (
                ("EncapNet-18", "encapnet", 7.51), ("GoogleNet", "googlenet", 7.89),
                ("VGG", "vgg16", 8.43), ("ResNet-101", "resnet101", 6.21))],
            own_data=True)],
    5: [Part("routing iterations, CapNet (dynamic)", CIFAR10, {"CIFAR-10": use("capnet-dynamic")}, [
        (str(r), dict(set=dict(iterations=r)), {"CIFAR-10": error})
        for r, error in ((1, 14.79), (2, 14.41), (3, 14.28), (4, 14.25))]),
        Part("initial routing coefficients", CIFAR10, {"CIFAR-10": use("capnet-dynamic")}, [
            (b, dict(set=dict(b_init=b)), {"CIFAR-10": error})
            for b, error in (("random", 14.35), ("zero", 14.28), ("learnable", 14.11))]),
        Part("loss and optimizer", dict(CIFAR10, **use("capnet-dynamic")),
             {"RMSProp": dict(optimizer="rmsprop"), "SGD": dict(optimizer="sgd"),
              "Adam": dict(optimizer="adam")}, [
            (name, dict(loss=loss), dict(RMSProp=rmsprop, SGD=sgd, Adam=adam))
            for name, loss, rmsprop, sgd, adam in (
                ("spread, fix m", "spread-fixed", 15.61, 15.38, 14.97),
                ("spread", "spread", 15.02, 14.87, 14.50),
                ("margin", "margin", 14.30, 15.18, 14.28),
                ("CE loss", "ce", 14.76, "fail", 15.31))])],
}
# Channels (EncapNet: 32 types x capsule dimension) and side of the outputs of M0 .. M4 of both
TABLE2 = {"stem": (32, 32), "blocks.0": (64, 32), "blocks.1": (128, 16), "blocks.2": (256, 8),
          "blocks.3": (512, 4)}
FIGURES = {
    2: ("agreement of votes with the class capsule",
        {"Dynamic": use("capnet-dynamic"), "EM": use("capnet-em")}),
    4: ("training loss with and without OT divergence",
        {"EncapNet": use("encapnet", feedback=0), "EncapNet * OT": use("encapnet", feedback=1),
         "ResNet": use("resnet18", feedback=0), "ResNet * OT": use("resnet18", feedback=1)}),
}


# ------------------------------------------------------------------------------------------------
# The runner: find what has been run, run what has not, print beside the paper's
# ------------------------------------------------------------------------------------------------


def read_lines(*files):
    """The entries of JSON-lines files; a torn line is told and left out."""
    for file in files:
        for n, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                yield entry
            elif line:
                say(f"{file}, line {n}: torn, left out")


def read_results(*files):
    """{(config key, seed): result}, later lines win, and the lines of --bench."""
    entries = list(read_lines(*files))
    return ({(e["key"], e["seed"]): e for e in entries if "key" in e},
            [e["bench"] for e in entries if "bench" in e])


def published():
    return sorted(PUBLISHED.glob("*.jsonl"))


def row_config(*layers):
    """A cell's Config.  --set reaches the networks that take it; types=T narrows the others."""
    changes = merge(*layers)
    cls, usual = encapnet.MODELS.get(changes["model"], (None, {}))
    wanted, types = changes["set"], changes["set"].get("types")
    if cls:
        mine = encapnet.keywords(cls)
        known = {name for other, _ in encapnet.MODELS.values() for name in encapnet.keywords(other)}
        wanted = {k: v for k, v in wanted.items() if k in mine or k not in known}
    if isinstance(types, int) and has_logits(changes["model"]):
        rest = {k: v for k, v in wanted.items() if k != "types"}
        wanted = {"width": usual.get("width", 1.0) * types / 32, **rest}
    return make_config(**{**changes, "set": wanted})


def part_columns(part, given):
    """The columns to run: with --dataset, that data set's, or the first on other data."""
    if "dataset" not in given or not all("dataset" in changes for changes in part.columns.values()):
        return part.columns
    same = {name: c for name, c in part.columns.items() if c["dataset"] == given["dataset"]}
    return same or dict(list(part.columns.items())[:1])


def part_cells(part, given, only=()):
    """(row, column, Config) of every cell that the paper fills by a run."""
    for name, changes, paper in part.rows:
        if changes is not None and (not only or any(word in name for word in only)):
            for column, about in part_columns(part, given).items():
                if paper.get(column) is not None:
                    yield name, column, row_config(part.base, about, changes, given)


def wanted_parts(number, given):
    """Blocks to run: with --dataset, those that can take it; ImageNet's keep to their own."""
    if "dataset" not in given:
        return TABLES[number]
    return [part for part in TABLES[number]
            if not part.own_data or part.base["dataset"] == given["dataset"]]


def obtain(name, config, runs):
    """Run a Config unless its result is known; a failure is reported, one of training recorded.

    -> None, or what went wrong
    """
    key = config_key(config)
    if (key, config.seed) in runs:
        return None
    folder = RUNS / f"{data_name(config)}-{config.model}-{key}-{config.seed}"
    finished = folder / "result.json"
    resume = str(folder) if (folder / "last.pt").exists() and not finished.exists() else None
    if finished.exists():                                 # but its line in results.jsonl was lost
        runs[key, config.seed] = json.loads((folder / "result.json").read_text())
        return None
    say(f"--- {name}, seed {config.seed}")
    try:
        config = dataclasses.replace(config, output_dir=str(folder), resume=resume)
        runs[key, config.seed] = fit(config)
        return None
    except Diverged as failure:
        line = {"data": data_name(config), "model": config.model, "key": key, "seed": config.seed,
                "error": None, "epochs": config.epochs, "outcome": str(failure).split(";")[0],
                "seconds": None, "folder": str(folder), "config": dataclasses.asdict(config),
                "environment": environment(pick_device(config.device))}
        runs[key, config.seed] = line
        if rank() == 0:
            record(line)
    except Problem as failure:
        if failure.code > 128:                            # asked to stop
            raise
        say(f"failed: {name}: {failure}")
        return f"{name}: {failure}"
    except (RuntimeError, MemoryError) as failure:        # out of memory, most likely
        say(f"failed: {name}: {reason(failure)}")
        return f"{name}: {reason(failure)}"


def obtain_all(cells, seeds, runs):
    """Run what is missing among cells [(name, Config)] -> what went wrong."""
    failures = []
    for name, config in cells:
        for seed in range(config.seed, config.seed + seeds):
            failures.append(obtain(name, dataclasses.replace(config, seed=seed), runs))
    return [f for f in failures if f]


def summary(config, paper, runs):
    """ours, difference and how, of one cell, over all seeds known -> three strings."""
    lines = [r for (key, _), r in sorted(runs.items()) if key == config_key(config)]
    if not lines:
        return "–", "–", "–"
    devices = " and ".join(sorted({r["environment"]["device"] for r in lines}))
    how = f"{len(lines)} seed{'s' * (len(lines) > 1)}, {lines[0]['epochs']} epochs, {devices}"
    bad = [r["outcome"] for r in lines if r["outcome"] != "ok"]
    if bad:
        return f"fail ({bad[0]})", "–", how
    errors = [r["top5_error" if config.dataset == "imagenet" else "error"] for r in lines]
    mean = statistics.mean(errors)
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{mean:.2f}{spread}", f"{mean - paper:+.2f}" if isinstance(paper, float) else "–", how


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def render_part(number, part, given, runs):
    """One block as Markdown: paper | ours | difference, of the same data, for each column."""
    columns = part_columns(part, given)
    theirs = {(row, column): config.dataset for row, column, config in part_cells(part, {})}
    cells = {(row, column): config for row, column, config in part_cells(part, given)}
    first = next(iter(cells.values()))
    many = len(columns) > 1
    header = [""] + [f"{name} {what}".strip() if many else what for name in columns
                     for what in ("paper", "ours", "difference")] + ["ours: how"]
    rows = []
    for name, changes, paper in part.rows:
        line, told = [name], {}
        for column in columns:
            value, config = paper.get(column), cells.get((name, column))
            shown = [f"{value:.2f}" if isinstance(value, float) else value or "–", "–", "–"]
            if config:
                same = config.dataset == theirs[name, column]
                *shown[1:], told[column] = summary(config, value if same else None, runs)
            line += shown
        how = {column: how for column, how in told.items() if how != "–"}
        alike = len(set(how.values())) == 1
        rows.append([*line, "quoted" if changes is None else next(iter(how.values())) if alike else
                     "; ".join(f"{column}: {each}" for column, each in how.items()) or "–"])
    return f"**Table {number}: {part.title}.** {told_of(first, given)}\n\n" + markdown(header, rows)


def changes_told(given):
    return "".join(f", {k}={v}" for k, v in given.get("set", {}).items())


def told_of(config, given):
    """The heading's account of what was run."""
    data = data_name(config) if "dataset" in given else "the paper's data"
    images = f", {config.train_images:,} training images" if config.train_images else ""
    changes = changes_told(given)
    fast = " (recipe fast: not the paper's schedule)" if config.recipe == "fast" else ""
    return f"Test error in %; ours: {data}{images}, {config.epochs} epochs{fast}{changes}."


def cost_key(config):
    """What decides the memory and time of a step, beside batch and device."""
    return {name: getattr(config, name) for name in (
        "model", "set", "image_size", "amp", "compile", "channels_last")}


def costs_of(config, benches):
    """The lines of --bench with these settings, of any batch and device."""
    return [b for b in benches if all(b.get(k) == v for k, v in cost_key(config).items())]


def render_costs(part, given, benches):
    """Table 1's parameters, memory and time a batch."""
    rows = []
    for name, changes, paper in part.rows:
        megabits, memory, batch, seconds = paper["cost"]
        config = row_config(CIFAR10, changes, given)
        known = costs_of(config, benches)
        line = next((b for b in reversed(known) if b["batch"] == batch), None)
        cells = ["–"] * 4
        if line:
            biggest = max((b for b in known if b["device"] == line["device"]),
                          key=lambda b: b["batch"])
            cells = [f"{line['parameters'] * 32 / 1e6:.2f}", f"{line['memory_MB']:,.0f}",
                     f"{biggest['memory_MB']:,.0f} ({biggest['batch']})",
                     f"{line['step_seconds']:.3f}"]
        rows.append([name, batch, megabits, cells[0], f"{memory:,}", *cells[1:3], seconds, cells[3],
                     line["device"] if line else "–"])
    return (f"**Table 1: cost.** Runtime: forward and backward of a batch{changes_told(given)}.\n\n"
            ) + markdown(
        ["", "batch", "Mb of parameters: paper", "ours", "MB of memory: paper", "ours",
         "ours, largest batch run", "s a batch: paper", "ours", "device"], rows)


def measure_costs(given, only):
    """Bench every row of Table 1 in a process of its own, whose peak memory is then its own."""
    for name, changes, paper in TABLES[1][0].rows:
        if only and not any(word in name for word in only):
            continue
        config, batch = row_config(CIFAR10, changes, given), paper["cost"][2]
        device = pick_device(config.device)
        benches = costs_of(config, read_results(*published(), RUNS / "results.jsonl")[1])
        known = [b["batch"] for b in benches if b["device"] == environment(device)["device"]]
        limit = batch if device.type == "cpu" else 4096
        while batch <= limit:
            if batch not in known:
                say(f"--- {name}: memory and time at batch {batch}")
                words = flags({**cost_key(config), "dataset": config.dataset, "batch_size": batch,
                               "device": config.device})
                if subprocess.run([sys.executable, __file__, "--bench", *words]).returncode:
                    say(f"batch {batch} did not run, and no larger one is tried")
                    break
            batch *= 2


def show_table(number, only, seeds, given):
    """Run what a table lacks, print it, keep it in runs/table-N.md -> exit code."""
    runs, _ = read_results(*published(), RUNS / "results.jsonl")
    failures = []
    if number == 1 and rank() == 0:
        measure_costs(given, only)
    for part in wanted_parts(number, given) if number != 2 else ():
        cells = [(f"{row}, {column}", config)
                 for row, column, config in part_cells(part, given, only)]
        failures += obtain_all(cells, seeds, runs)
    benches = read_results(*published(), RUNS / "results.jsonl")[1]
    text = render_table(number, given, (runs, benches))
    say("\n" + text)
    if rank() == 0:
        RUNS.mkdir(exist_ok=True)
        write_file(RUNS / f"table-{number}.md", text.encode())
    if failures:
        raise Problem(f"{len(failures)} runs failed: {'; '.join(failures)}", 1)


def render_table(number, given, results):
    if number == 2:
        return architecture("encapnet", given) + "\n\n" + architecture("resnet18", given)
    runs, benches = results
    texts = [render_part(number, part, given, runs) for part in wanted_parts(number, given)]
    if number == 1:
        texts.insert(0, render_costs(TABLES[1][0], given, benches))
    return "\n\n".join(texts)


def watched(network, x):
    """Run x through the network -> {layer name: (output shape without batch, FLOPs)}."""
    from torch.utils.flop_counter import FlopCounterMode
    shapes = {}

    def note(name, out):
        out = out[-1] if isinstance(out, tuple) else out
        shapes[name] = tuple(out.shape[1:])

    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, given, out, name=name: note(name, out))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    flops = {k.partition(".")[2]: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    return {name: (shape, flops.get(name, 0)) for name, shape in shapes.items()}


def architecture(name, given):
    """Table 2 from the built network; a Problem where sizes are not the paper's."""
    narrow = {"set": given.get("set", {})}
    network = make_model(row_config(CIFAR10, use(name, feedback=0), narrow), 10, 3).eval()
    seen, rows = watched(network, torch.zeros(1, 3, 32, 32)), []
    for key, module in network.named_modules():
        if key in ("stem", "classes") or re.fullmatch(r"blocks\.\d\.\w+", key):
            parts = [k for k in seen if k == key or k.startswith(key + ".")]
            depth = min(k.count(".") for k in parts)      # a list has no output of its own
            parts = [k for k in parts if k.count(".") == depth]
            shape = seen[parts[-1]][0]
            image = name == "encapnet" and len(shape) == 3
            capsule = shape[0] // network.types if image else shape[-1]
            weights = sum(p.numel() for p in module.parameters())
            rows.append([key + f" x {len(parts)}" * (len(parts) > 1), " x ".join(map(str, shape)),
                         capsule if name == "encapnet" else "–", f"{weights:,}",
                         f"{sum(seen[k][1] for k in parts) / 1e6:,.2f}"])
    wrong = not given.get("set") and {
        key: seen[key][0] for key, (channels, side) in TABLE2.items()
        if seen[key][0] != (channels, side, side)}
    if wrong:
        raise Problem(f"Table 2: {name} gives {wrong}, the paper has {TABLE2}", 1)
    weights = sum(p.numel() for p in network.parameters())
    note = f"changed by {narrow['set']}" if given.get("set") else "output sizes as the paper's"
    return (f"**Table 2: {name}.** {weights:,} parameters, {seen[''][1] / 1e6:,.0f} million FLOPs "
            f"an image; {note}.\n\n"
            + markdown(["layer", "output", "capsule dim", "parameters", "MFLOPs"], rows))


def show_figure(number, seeds, given):
    """Run what a figure lacks and draw it, into --output-dir or runs/."""
    title, variants = FIGURES[number]
    target = Path(given.get("output_dir", RUNS)) / f"figure-{number}.png"
    given = {k: v for k, v in given.items() if k != "output_dir"}
    configs = {name: row_config(CIFAR10, changes, given) for name, changes in variants.items()}
    runs, _ = read_results(*published(), RUNS / "results.jsonl")
    failures = obtain_all(list(configs.items()), seeds, runs)
    if failures:
        raise Problem(f"{len(failures)} runs failed: {'; '.join(failures)}", 1)
    lines = {name: [r for (key, _), r in sorted(runs.items())
                    if key == config_key(config) and "curves" in r]
             for name, config in configs.items()}
    for name, config in configs.items():
        if not lines[name]:
            raise Problem(f"{name}: nothing to draw, {summary(config, None, runs)[0]}", 1)
    if rank() == 0:
        title = f"{title}, {data_name(next(iter(configs.values())))}"
        {2: draw_figure2, 4: draw_figure4}[number](lines, title, target)


def report(check):
    """Render README's tables, <!-- table 3 --epochs 20 ... --> to <!-- end -->, from results/."""
    runs, benches = read_results(*published())

    def fill(match):
        words = shlex.split(match[1])
        if words[0] == "runs":
            return f"<!-- {match[1]} -->\n{render_runs(runs)}\n<!-- end -->"
        if words[0] == "speed":
            from bench import render_speed
            return f"<!-- {match[1]} -->\n{render_speed(read_lines(*published()))}\n<!-- end -->"
        commands, given = parse(words[2:])
        if commands:
            raise Problem(f"{README}: {match[1]}: only flags of a run here")
        command = f"`python train.py --table {shlex.join(words[1:])}`"
        table = render_table(int(words[1]), given, (runs, benches))
        return f"<!-- {match[1]} -->\n{table}\n\n{command}\n<!-- end -->"

    if not README.exists():
        raise Problem(f"no {README} here")
    before = README.read_text()
    block = r"<!-- ((?:table \d|runs|speed)[^>]*?) -->\n.*?<!-- end -->"
    after = re.sub(block, fill, before, flags=re.S)
    if after != before and check:
        raise Problem(f"{README} does not agree with {PUBLISHED}/: run python train.py --report", 1)
    if after != before:
        write_file(README, after.encode())
    say(f"{README}: {'brought up to date' if after != before else 'up to date'}")


def render_runs(runs):
    """The single runs, those of no table: command, device, time, error."""
    rows = [[f"`{r['environment']['command']}`", r["data"], f"{r['error']:.2f}", r["epochs"],
             clock(r["seconds"]),
             r["environment"]["device"]] for r in runs.values() if r["outcome"] == "ok"
            and not re.search("--table|--figure", r["environment"]["command"])]
    return markdown(["command", "data", "test error %", "epochs", "time", "device"], rows)


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")    # Okabe and Ito's, colour-blind safe


def canvas(rows, columns, width=10, height=3.2):
    """A figure outside pyplot's global state, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())
    say(f"wrote {path}")


@torch.no_grad()
def draw_run(run, shown=24):
    """curves.png: loss and error against epochs, and test images with the network's answers."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 4))
    left, right = top.subplots(1, 2)
    epochs = [e["epoch"] for e in run.history]
    for axis, names, unit in ((left, ("loss", "feedback"), "loss"),
                              (right, ("train_error", "test_error"), "error (%)")):
        for name, colour in zip(names, COLOURS, strict=False):
            axis.plot(epochs, [e[name] for e in run.history], ".-", color=colour,
                      label=name.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
        axis.grid(alpha=0.3)
    n = len(run.data.test)
    index = torch.linspace(0, n - 1, min(shown, n), device=run.device).long()
    images, labels, _ = next(run.data.test.batches([index], run.device))
    x = next(test_views(images, run.data.side, False, False))
    run.net.eval()
    answers = call(run.net, run.config, normalised(x, run.data))[0].argmax(1).tolist()
    pictures = x.permute(0, 2, 3, 1).cpu().expand(-1, -1, -1, 3).numpy()
    axes = bottom.subplots(3, 8).flat
    shown = itertools.zip_longest(axes, pictures, answers, labels.tolist())
    for axis, picture, answer, label in shown:
        axis.set_axis_off()
        if picture is not None:
            wrong = answer != label
            axis.imshow(picture)
            truth = f", is {run.data.classes[label]}" if wrong else ""
            axis.set_title(run.data.classes[answer] + truth, fontsize=8,
                           color=COLOURS[1] if wrong else "black")
    save_figure(figure, run.folder / "curves.png")


def draw_agreement(axis, moment):
    """Histogram of the cosine of votes and capsule, and above it their mean length -> its axis."""
    bins = len(moment["percent"])
    centres = [-1 + (2 * k + 1) / bins for k in range(bins)]
    axis.bar(centres, moment["percent"], 2 / bins, color="0.75")
    axis.set_xticks((-1, -0.5, 0, 0.5, 1))
    twin = axis.twinx()
    twin.plot(centres, [length if percent else math.nan for percent, length in
                        zip(moment["percent"], moment["length"], strict=True)], color=COLOURS[0])
    twin.set_ylim(bottom=0)
    return twin


def draw_figure2(lines, title, path):
    """Rows: routings; columns: moments.  Grey: % of votes, blue: their mean length.   [Fig. 2]"""
    lines = {name: found[0]["moments"] for name, found in lines.items()}
    figure, axes = canvas(len(lines), max(map(len, lines.values())), height=2.6)
    figure.suptitle(title, fontsize=10)
    for row, (name, moments) in zip(axes, lines.items(), strict=True):
        for axis, moment in zip(row, moments, strict=False):
            draw_agreement(axis, moment).tick_params(labelsize=7, labelcolor=COLOURS[0])
            axis.set_title(f"{name}, epoch {moment['epoch']}", fontsize=9)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel("% of votes (grey)", fontsize=8)
        row[len(moments) - 1].set_xlabel("cosine of vote and capsule; blue: vote length",
                                         fontsize=7)
    save_figure(figure, path)


def draw_figure4(lines, title, path):
    """Training loss without and with divergence; a panel a network, as losses differ.   [Fig. 4]"""
    figure, axes = canvas(1, 2)
    figure.suptitle(title, fontsize=10)
    for name, found in lines.items():
        axis = axes[0, int(name.startswith("ResNet"))]
        loss = torch.tensor([r["curves"]["loss"] for r in found]).mean(0).tolist()
        axis.plot(range(1, len(loss) + 1), loss, "-" if "OT" in name else "--",
                  color=COLOURS["OT" in name], label=name)
        axis.set(xlabel="epoch", ylabel="classification loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------
# Use a trained network
# ------------------------------------------------------------------------------------------------


def trained(given):
    """The run of --resume, for looking at -> config, checkpoint, network in eval mode, device."""
    state = load_checkpoint(given["resume"])
    config = Config(**merge(state["config"], given))
    device = start(config)
    channels = len(state["data"]["mean"])
    net = make_model(config, len(state["data"]["classes"]), channels)
    try:
        net.load_state_dict(plain_names(state["net"]))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise Problem(f"{given['resume']} does not fit {config.model} ({reason(error)})") from error
    return config, state, net.to(device).eval(), device


def test_only(given):
    """Test error of a trained network, on its own data or, with --data-path, on other like it."""
    config, state, net, device = trained(given)
    data = load_data(config, device)
    if data.classes != state["data"]["classes"]:
        raise Problem(f"{data.name} has other classes than the data the network was trained on")
    data = dataclasses.replace(data, mean=state["data"]["mean"].to(device),
                               std=state["data"]["std"].to(device))
    run = Run(config, data, device, net, net, None, {})
    test = evaluate(run, config.augment != "none")
    say(f"{data.name}, {config.model} after epoch {state['epoch']}: test error "
        f"{test['error']:.2f} %, top-5 {test['top5_error']:.2f} %, {test['images']:,} images")


@torch.no_grad()
def predict(files, given):
    """Class and length (or probability) of each class capsule for image files."""
    config, state, net, device = trained(given)
    classes, mean = state["data"]["classes"], state["data"]["mean"]
    data = Data(state["data"]["name"], classes, None, None, config.image_size, mean.to(device),
                state["data"]["std"].to(device))
    for file in files:
        try:
            image = decode(file, config.image_size)
        except Exception as error:                                       # PIL raises all kinds
            raise Problem(f"cannot read {file}: {reason(error)}") from error
        x = image[None].to(device).float() / 255
        scores = call(net, config, normalised(grey(x) if len(mean) == 1 else x, data))[0][0]
        scores = (scores.softmax(0) if net.logits else scores).tolist()
        order = sorted(range(len(classes)), key=lambda k: -scores[k])[:20]
        print(f"{file}: {classes[order[0]]}\n  ", *(f"{classes[k]} {scores[k]:.3f}" for k in order))


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Problem(message)


def make_parser():
    """One flag for every field of Config, and the commands."""
    parser = Parser("train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Defaults are the paper's, but without --dataset or with --dataset "
                           f"digits:\n{' '.join(flags(RECIPES['digits']))}",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    commands = parser.add_argument_group("commands; without one, train")
    commands.add_argument("--table", type=int, choices=sorted({2, *TABLES}),
                          help="run a table of the paper")
    commands.add_argument("--row", nargs="+", metavar="TEXT",
                          help="only its rows with this in their name")
    commands.add_argument("--seeds", type=number(1), metavar="K", help="of each row (default: 1)")
    commands.add_argument("--figure", type=int, choices=sorted(FIGURES),
                          help="run and draw a figure of the paper")
    commands.add_argument("--report", action="store_true",
                          help="render README's tables from results/")
    commands.add_argument("--check", action="store_true",
                          help="with --report: only compare, exit 1 if it differs")
    commands.add_argument("--bench", nargs="?", const="step",
                          choices=("step", "routing", "sinkhorn", "network", "scaling"),
                          help="speed and memory of training, or of its parts beside others' code")
    commands.add_argument("--test-only", action="store_true", help="test the network of --resume")
    commands.add_argument("--predict", nargs="+", metavar="IMAGE",
                          help="classify with the network of --resume")
    commands.add_argument("--list", action="store_true", help="models, data sets, tables")
    commands.add_argument("--debug", action="store_true", help="show the traceback of an error")
    groups = {}
    for field in dataclasses.fields(Config):
        about = field.metadata
        group = groups.setdefault(about["group"], None) or parser.add_argument_group(about["group"])
        groups[about["group"]] = group
        flag = {"help": about["help"].replace("%", "%%"), **about["flag"]}
        if field.type is bool:
            flag["action"] = argparse.BooleanOptionalAction
        else:
            flag["type"] = about["type"] or field.type
            flag.setdefault("metavar", field.name.rpartition("_")[2].upper())
        if field.default not in ("", None, dataclasses.MISSING):
            several = isinstance(field.default, tuple)
            shown = " ".join(map(str, field.default)) if several else field.default
            flag["help"] += f" (default: {shown})"
        group.add_argument("--" + field.name.replace("_", "-"), **flag)
    return parser


def parse(arguments):
    """Command line -> commands {name: value}, Config fields given {name: value}."""
    parser = make_parser()
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise Problem(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], flags)}")
    found = vars(found)
    names = [f.name for f in dataclasses.fields(Config)]
    given = {name: found.pop(name) for name in names if name in found}
    if "set" in given:
        given["set"] = dict(given["set"])
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    return found, given


def with_run(given, finished):
    """Replace --resume without a path by the newest fitting run."""
    if given.get("resume", "newest") != "newest":
        return given
    wanted = {k: v for k, v in given.items() if not Config.__dataclass_fields__[k].metadata["free"]}
    folder = given.get("output_dir") or newest(wanted, finished)
    if not folder:
        fields = "".join(f", {k}={v}" for k, v in wanted.items())
        kind = "" if finished else "unfinished "
        raise Problem(f"no {kind}run in {RUNS}/{fields}; give --resume PATH")
    say(f"newest run: {folder}")
    return {**given, "resume": str(folder)}


def train(given):
    """Plain training: a new run, or the rest of an old one, whose settings then hold."""
    if "resume" in given:
        given = with_run(given, finished=False)
        state = load_checkpoint(given["resume"])
        config = Config(**merge(state["config"], given))
        check_same(config, state)
        result = fit(config)
    else:
        result = fit(make_config(**given))
    best = result["best_by_test_error"]
    say(f"test error {result['error']:.2f} % after {result['epochs']} epochs and "
        f"{clock(result['seconds'])}"
        + (f" (the best epoch by test error, {best['epoch']}: {best['test_error']:.2f} %)"
           if best["epoch"] else ""))
    say(f"curves and predictions: {result['folder']}/curves.png")


def show_list():
    print("models:")
    for name in models():
        about = encapnet.MODELS[name] if name in encapnet.MODELS else ("torchvision's", "")
        kind = getattr(about[0], "__name__", about[0])
        print(f"  {name:18}", kind, json.dumps(about[1]) if about[1] else "")
    print("data sets:")
    for name, source in DATASETS.items():
        print(f"  {name:18} {source.note}")
    print("tables and figures:")
    for number, parts in sorted({**TABLES, 2: [Part("architectures", {}, {}, [])]}.items()):
        blocks = "; ".join(part.title.partition(";")[0] for part in parts)
        print(f"  --table {number}          {blocks}")
    for number, (title, _) in FIGURES.items():
        print(f"  --figure {number}         {title}")


def check_commands(commands, given):
    """One command at a time, with the flags that it heeds."""
    heeded = {"list": (), "report": ("check",), "bench": (), "table": ("row", "seeds"),
              "figure": ("seeds",), "test_only": (), "predict": ()}
    asked = [name for name in heeded if name in commands]
    def told(names):
        return ", ".join(sorted("--" + name.replace("_", "-") for name in names))
    if len(asked) > 1:
        raise Problem(f"{told(asked)}: one at a time")
    known = heeded[asked[0]] if asked else ()
    if idle := [name for name in commands if name not in (*asked, *known, "debug")]:
        raise Problem(f"{told(idle)}: no use " + (f"with {told(asked)}" if asked else "alone"))
    if commands.get("bench", "step") != "step" and set(given) - {"device"}:
        raise Problem(f"{told(set(given) - {'device'})}: no use with --bench {commands['bench']}")
    if not {"table", "figure"} & set(commands):
        return
    if "model" in given or "resume" in given:
        raise Problem("--table and --figure choose the models and resume by themselves: "
                      "no --model, no --resume")
    if commands.get("figure") == 2 and commands.get("seeds", 1) > 1:
        raise Problem("--figure 2 shows one run of each routing: no --seeds")
    rows = [row[0] for part in TABLES.get(commands.get("table"), ()) for row in part.rows]
    for word in commands.get("row", ()):
        if not any(word in row for row in rows):
            raise Problem(f"--row {word!r}: no such row{did_you_mean(word, rows)}; choose from "
                          f"{', '.join(rows)}")


def command(commands, given):
    check_commands(commands, given)
    if "list" in commands:
        return show_list()
    if "report" in commands:
        return report("check" in commands)
    if "bench" in commands:
        from bench import run_bench
        return run_bench(commands["bench"], make_config(**given))
    if "figure" in commands:
        return show_figure(commands["figure"], commands.get("seeds", 1), given)
    if "table" in commands:
        return show_table(commands["table"], commands.get("row", ()), commands.get("seeds", 1),
                          given)
    if "predict" in commands:
        return predict(commands["predict"], with_run(given, finished=True))
    if "test_only" in commands:
        return test_only(with_run(given, finished=True))
    return train(given)


def guarded(program, function, arguments):
    """function(arguments) -> exit code: 0, 2 for bad input, 1 for a failure, 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        function(arguments)
        return 0
    except BrokenPipeError:                                              # piped into head
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = error.code if isinstance(error, Problem) else 1, str(error)
        if isinstance(error, KeyboardInterrupt):
            code, message = 130, "interrupted"
        elif not isinstance(error, Problem):
            message = f"unexpected {type(error).__name__}: {reason(error)} (--debug shows where)"
        if rank() == 0 or code == 1:
            print(f"{program}: {' '.join(message.splitlines())}", file=sys.stderr)
        return code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments=None):
    """-> exit code"""
    return guarded("train.py", lambda words: command(*parse(words)), arguments)


if __name__ == "__main__":
    from train import main  # the copy that bench.py imports too, with the same Problem
    sys.exit(main())
