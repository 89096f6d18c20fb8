"""Data sets and their batches: small sets are uint8 tensors on the device, big ones are files
read by worker processes; augmentation is a function of (seed, epoch, image), on the device."""
import dataclasses
import functools
import hashlib
import json
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config import Config, data_name
from lab.digits import draw_digits
from lab.runtime import Problem, rank_by_rank, reason, say, write_file

HELD_BYTES = 4 << 30          # image folders up to this size are decoded once and held
HUGE_PIXELS = 100_000_000     # a larger image is refused rather than decoded
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


class Files(torch.utils.data.Dataset):
    """Image files, decoded when asked for."""

    def __init__(self, paths, side):
        self.paths, self.side = paths, side

    def __len__(self):
        return len(self.paths)

    def only(self, wanted):
        """Those where a mask (n,) is True."""
        return Files([self.paths[k] for k in wanted.nonzero()[:, 0].tolist()], self.side)

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
            raise Problem(last.removeprefix("lab.runtime.Problem: "), 1) from None


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


def drawn_by(config, split):
    """The seed of the images that are kept or drawn: the same for every run unless --resample."""
    return config.seed if config.resample and split == "train" else 0


def chosen(n, config, split):
    """Positions of the images that --train-images, --test-images keep."""
    wanted = getattr(config, f"{split}_images")
    if wanted > n:
        raise Problem(f"--{split}-images {wanted}: there are only {n}")
    generator = torch.Generator().manual_seed(drawn_by(config, split))
    order = torch.randperm(n, generator=generator)
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
    return [draw_digits(n, split == "train", drawn_by(config, split))[:2]
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
        keep = chosen(len(images), config, split)
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
        files = [files[k] for k in chosen(len(files), config, split)]
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
        keep = chosen(len(samples), config, split)
        samples = [samples[k] for k in keep]
        images, samples = cached_images(root / "h-imagenet-cache", samples, held, config)
        splits.append((images, torch.tensor([classes.index(name) for _, _, name in samples])))
    return splits, classes

LOADERS = {"digits": load_digits, **dict.fromkeys(TORCHVISION, load_torchvision),
           "folder": load_folder, "h-imagenet": load_h_imagenet, "imagenet": load_folder}


def load_data(config, device):
    """The data set of a Config; rank 0 first, which may download.  The last is kept."""
    names = ("dataset", "data_path", "image_size", "train_images", "test_images", "resample",
             "hold_out", "class_list", "unreadable")
    fields = {**{name: getattr(config, name) for name in names},
              "augment": "none" if config.augment == "none" else "+",
              "seed": drawn_by(config, "train")}
    with rank_by_rank():
        return read_data(device, tuple(fields.items()))


@functools.lru_cache(maxsize=1)
def read_data(device, fields):
    config = Config(**dict(fields))
    side, whole = config.image_size, config.dataset in ("imagenet", "h-imagenet")
    held = enlarged(side) if config.augment != "none" or whole else side
    splits, classes = LOADERS[config.dataset](config, held)
    splits = held_out(*splits[0]) if config.hold_out else splits
    halves = []
    for images, labels in splits:
        if isinstance(images, Tensor) and images.shape[-1] != held:
            images = fit_side(fit_side(images, side), held)
        if isinstance(images, Tensor) and images.nbytes <= HELD_BYTES:
            images = images.contiguous().to(device)
        halves.append(Split(images, labels.to(device)))
    if len(classes) < 2:
        raise Problem(f"{data_name(config)} has one class, {classes[0]}: nothing to tell apart")
    mean, std = channel_moments(halves[0], device)
    return Data(data_name(config), classes, *halves, side, mean, std)


def held_out(images, labels):
    """Training images in two, nine tenths and every tenth: sorted classes stay balanced."""
    tenth = torch.arange(len(labels)) % 10 == 9
    return [(images[part] if isinstance(images, Tensor) else images.only(part), labels[part])
            for part in (~tenth, tenth)]


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


def views(images, side, multi_crop, mirror):
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
