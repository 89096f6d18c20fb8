"""Folders of image files, one's own or ImageNet's: which there are, read and decoded."""
import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from lab.runtime import Problem, count, reason, say

HELD_BYTES = 2 << 30          # folders up to this size are decoded once and held
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
            ".webp")
FULL_SCALES = (1, 2 ** 8 - 1, 2 ** 12 - 1, 2 ** 16 - 1)          # of white in one-channel images


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


def as_bytes(values):
    """Numbers of an image in one of the usual ranges, the smallest that holds them -> uint8."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= FULL_SCALES[-1]:
        raise ValueError(f"pixels from {low:g} to {high:g}; known are 0 to 1, 255, 4095 or 65535")
    white = next(w for w in FULL_SCALES if high <= w)
    return (values * (255 / white)).round().astype(np.uint8)


def decode(file, side, box=None):
    """An image file, PIL image or array (H, W) or (H, W, 3 or 4) of any kind -> (3, side, side)
    uint8: upright, on white where it is transparent, short side resized, centre cropped.

    box: (left, top, right, bottom) to cut out first
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor
    if isinstance(file, np.ndarray):
        file = Image.fromarray(file if file.dtype == np.uint8 else as_bytes(file))
    with contextlib.nullcontext(file) if isinstance(file, Image.Image) else \
            Image.open(file) as image:                    # PIL refuses what is too large
        image.load()                                      # raises where pixels are damaged
        with contextlib.suppress(Exception):              # a damaged EXIF block raises anything
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                             # 16 or 32 bits, whichever way stored
        image = Image.fromarray(as_bytes(np.asarray(image.convert("F"))))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").crop(box) if box else image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(s * scale)) for s in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2                # whole pixels
    return pil_to_tensor(image.crop((left, top, left + side, top + side)))


class Files(Dataset):
    """Image files, decoded when asked for.   samples: [(path, box to cut out or None)]"""

    def __init__(self, samples, side):
        self.samples, self.side = samples, side

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, k):
        path, box = self.samples[k]
        try:
            return decode(path, self.side, box)
        except Exception as error:
            raise OSError(f"cannot read {path}: {reason(error)}") from error


def split_folder(root, split):
    """ROOT/train, ROOT/test; ROOT/val where there is no test."""
    for name in ("train",) if split == "train" else ("test", "val"):
        if (root / name).is_dir():
            return root / name
    raise Problem(f"no folder {root / split}: images go to {root}/train/CLASS/*.jpg "
                  f"and {root}/test/CLASS/*.jpg (or val)")


def shown(names):
    """Names in order, but for what is hidden or a system's own."""
    return sorted(name for name in names if name[0] != "." and name != "__MACOSX")


def class_folders(folder):
    found = [name for name in shown(os.listdir(folder)) if (folder / name).is_dir()]
    if not found:
        raise Problem(f"{folder} has no class folders: images go to {folder}/CLASS/*.jpg")
    return found


def files_below(folder):
    """Paths of the files in a folder and in its folders, but not in those that are links."""
    for place, folders, names in os.walk(folder):
        folders[:] = shown(folders)
        yield from (os.path.join(place, name) for name in shown(names))


def is_image(path):
    return path.lower().endswith(SUFFIXES)


def read_images(files, folder, unreadable):
    """Images held in memory where they fit, else files, looked at once; places of those kept."""
    fits, n = len(files) * 3 * files.side ** 2 <= HELD_BYTES, count(len(files), "image")
    if not fits and unreadable == "trust":
        return files, range(len(files))
    say(f"reading {n} of {folder}" if fits else
        f"checking {n} of {folder} (--unreadable trust: do not)")

    def read(k):
        try:
            pixels = files[k]
            return pixels if fits else None
        except OSError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(read, range(len(files))))
    bad = [str(x).removeprefix("cannot read ") for x in found if isinstance(x, OSError)]
    keep = [k for k, x in enumerate(found) if not isinstance(x, OSError)]
    if bad:
        report = f"{len(bad)} of {n} cannot be read: {'; '.join(bad[:3])}"
        if unreadable != "skip" or not keep:
            raise Problem(f"{report}; mend or remove them, or --unreadable skip")
        say(f"skipped: {report}")
    return torch.stack([found[k] for k in keep]) if fits else Subset(files, keep), keep


def load_folder(config, held):
    """train/CLASS/*.jpg and test/CLASS/*.jpg (or val/); test may lack classes that training has."""
    train, test = (split_folder(Path(config.data_path), split) for split in ("train", "test"))
    classes = class_folders(train)
    if unknown := sorted(set(class_folders(test)) - set(classes)):
        raise Problem(f"{test} has classes that training has not: {', '.join(unknown)}")
    return load_classes(config, held, classes, {})


def load_classes(config, held, classes, boxes):
    """Images of these classes, or what is in their boxes: {name of an image: [box]}."""
    splits, sources = [], []
    for split in ("train", "test"):
        folder = split_folder(Path(config.data_path), split)
        files = [(path, k) for k, name in enumerate(classes) for path in files_below(folder / name)]
        if others := {Path(path).suffix or path for path, _ in files if not is_image(path)}:
            say(f"{folder}: passed over, not images by their names: {', '.join(sorted(others))}")
        files = [(path, k) for path, k in files if is_image(path)]
        samples = [((path, box), k) for path, k in files
                   for box in boxes.get(Path(path).stem, [None])]
        seen = {k for _, k in samples}
        if lacking := [name for k, name in enumerate(classes) if k not in seen]:
            told = f"{folder}: no images in {', '.join(lacking[:5])}" + ", ..." * (len(lacking) > 5)
            if split == "train" or not samples:
                raise Problem(f"{told} (known by their names: {' '.join(SUFFIXES)})")
            say(f"{told}: not tested")
        names = json.dumps([(Path(path).name, k, os.path.exists(path) and os.path.getsize(path))
                            for path, k in files])
        sources.append(f"{len(files)} files {hashlib.sha256(names.encode()).hexdigest()[:16]}")
        samples = [samples[k] for k in chosen(len(samples), config, split)]
        images, keep = read_images(Files([s for s, _ in samples], held), folder, config.unreadable)
        splits.append((images, torch.tensor([samples[k][1] for k in keep])))
    return splits, classes, " + ".join(sources)


# ---- h-ImageNet   [Sec. 5] -----------------------------------------------------------------------

def annotated_boxes(root, padding=0.1, smallest=50):
    """{image name: its boxes (left, top, right, bottom), enlarged}, from ImageNet's annotations.

    Boxes under 50 pixels in height or width are left out, as in the authors' preparation; an image
    that has no others keeps none.
    """
    from xml.etree import ElementTree
    boxes = {}
    for file in sorted((root / "Annotations").rglob("*.xml")):
        try:
            for box in ElementTree.parse(file).iter("bndbox"):
                left, top, right, bottom = (
                    int(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
                kept = boxes.setdefault(file.stem, [])
                if min(right - left, bottom - top) >= smallest:
                    dx, dy = padding * (right - left), padding * (bottom - top)
                    kept.append(tuple(map(round, (left - dx, top - dy, right + dx, bottom + dy))))
        except (ElementTree.ParseError, TypeError, ValueError) as error:
            raise Problem(f"annotation {file} is damaged: {error}") from error
    return boxes


def load_h_imagenet(config, held):
    """255,725 + 17,101 images in the paper: hard classes, objects cut out by their boxes. [Sec. 5]

    The 200 classes are those on which a ResNet-18's top-1 error is highest, hardest first: the file
    data/imagenet/top1_hardest_200_cls.txt of github.com/hli2020/nn_encapsulation, commit 2898d2f.
    An image without annotations is taken whole; one whose boxes are all small is left out.
    """
    file = Path(config.class_list or Path(__file__).with_name("h-imagenet-classes.txt"))
    try:
        classes = file.read_text().split()
    except OSError as error:
        raise Problem(f"--class-list {file}: {error.strerror}") from error
    if not classes:
        raise Problem(f"--class-list {file} is empty")
    return load_classes(config, held, classes, annotated_boxes(Path(config.data_path)))
