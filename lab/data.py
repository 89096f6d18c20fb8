"""Data sets and their batches: small sets are uint8 tensors on the device, big ones are files
read by worker processes; augmentation is a function of (seed, epoch, image), on the device."""
import dataclasses
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from lab import folders
from lab.digits import draw_digits
from lab.folders import Files, chosen, drawn_by
from lab.results import data_name
from lab.runtime import Problem, rank, reason, world


@dataclasses.dataclass
class Split:
    """Half of a data set.   images (n, C, R, R) uint8, or files;  labels (n,)"""

    images: Tensor | Files | Subset
    labels: Tensor

    def __len__(self):
        return len(self.labels)

    def batches(self, chunks, device, workers=0):
        """(images, labels, index) of each chunk, a tensor of positions; all on the device."""
        if isinstance(self.images, Tensor):
            found = (self.images[index.to(self.images.device)] for index in chunks)
        else:
            found = torch.utils.data.DataLoader(
                self.images, batch_sampler=[chunk.tolist() for chunk in chunks],
                num_workers=workers, pin_memory=device.type == "cuda", generator=torch.Generator())
        for images, index in zip(found, chunks, strict=True):
            yield images.to(device, non_blocking=True), self.labels[index], index


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
    source: str = ""          # what distinguishes own images from others, wherever they lie


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
    train = draw_digits(config.train_images or 10000, True, drawn_by(config, "train"))
    test = draw_digits(config.test_images or 2000, False)
    return [train[:2], test[:2]], [str(k) for k in range(10)], ""


TORCHVISION = {   # class, and what to fetch by hand
    "mnist": ("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/*-ubyte.gz"),
    "fashion-mnist": ("FashionMNIST", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
                      "*-ubyte.gz"),
    "cifar10": ("CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "svhn": ("SVHN", "http://ufldl.stanford.edu/housenumbers/train_32x32.mat and test_32x32.mat"),
}


def load_torchvision(config, held):
    """One of torchvision's data sets, downloaded and checksummed by it."""
    import torchvision.datasets
    name, address = TORCHVISION[config.dataset]
    folder, splits = Path(config.data_path, f"{name}/raw" if "MNIST" in name else ""), []
    for split in ("train", "test"):
        which = {"split": split} if name == "SVHN" else {"train": split == "train"}
        try:                                              # downloads what is not there or damaged
            part = getattr(torchvision.datasets, name)(config.data_path, download=True, **which)
            images = torch.as_tensor(part.data)
            labels = torch.as_tensor(part.labels if name == "SVHN" else part.targets).long()
        except Exception as error:                        # torchvision raises all kinds
            raise Problem(f"{config.dataset}: no intact {split} files ({reason(error)}); put a "
                          f"fresh copy of {address} into {folder}") from error
        images = images.unsqueeze(1) if images.dim() == 3 else images
        images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
        keep = chosen(len(images), config, split)
        splits.append((images[keep], labels[keep]))
    return splits, [str(c) for c in getattr(part, "classes", range(10))], ""


LOADERS = {"digits": load_digits, **dict.fromkeys(TORCHVISION, load_torchvision),
           "folder": folders.load_folder, "h-imagenet": folders.load_h_imagenet,
           "imagenet": folders.load_folder}


def load_data(config, device):
    """The data set of a Config; rank 0 first, which may download."""
    for first in (True, False):
        if first == (rank() == 0):
            data = read_data(config, device)
        if world() > 1:
            dist.barrier()
    return data


def read_data(config, device):
    side, whole = config.image_size, config.dataset in ("imagenet", "h-imagenet")
    held = enlarged(side) if config.augment != "none" or whole else side
    splits, classes, source = LOADERS[config.dataset](config, held)
    splits = held_out(*splits[0]) if config.hold_out else splits
    halves = []
    for images, labels in splits:
        if isinstance(images, Tensor) and images.shape[-1] != held:
            images = fit_side(fit_side(images, side), held)
        if isinstance(images, Tensor) and images.nbytes <= folders.HELD_BYTES:
            images = images.contiguous().to(device)
        halves.append(Split(images, labels.to(device)))
    if len(classes) < 2:
        raise Problem(f"{data_name(config)} has one class, {classes[0]}: nothing to tell apart")
    mean, std = channel_moments(halves[0], device)
    return Data(data_name(config), classes, *halves, side, mean, std, source)


def held_out(images, labels):
    """Training images in two, nine tenths and every tenth: sorted classes stay balanced."""
    if len(labels) < 10:
        raise Problem(f"--hold-out: every tenth of {len(labels)} training images is none")
    tenth = torch.arange(len(labels)) % 10 == 9
    return [(images[part] if isinstance(images, Tensor)
             else Subset(images, part.nonzero()[:, 0].tolist()), labels[part])
            for part in (~tenth, tenth)]


def channel_moments(split, device):
    """Mean and deviation of each channel of training images in [0, 1]; of 2,000 of a big set."""
    every = 1 if isinstance(split.images, Tensor) else math.ceil(len(split) / 2000)
    places, sums = torch.arange(0, len(split), every, device=device), 0
    for images, _, _ in split.batches(places.split(500), device):
        x = images.float() / 255
        sums += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]).cpu().double()
    mean, square = sums / (len(places) * images[0, 0].numel())
    std = (square - mean ** 2).clamp(min=0).sqrt()
    return mean.float().to(device), std.clamp(min=1e-3).float().to(device)


# ---- Augmentation, a function of (seed, epoch, image), vectorised on the device   [App. C] -------

def shuffle(n, seed, epoch):
    """The order of an epoch (n,) and seven uniform numbers an image (n, 7)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator), torch.rand(n, 7, generator=generator)


def crop(images, top, left, side, mirror):
    """Cut (B, C, side, side) out of (B, C, R, R), each at its place, mirrored where mirror (B,)."""
    windows = images.unfold(2, side, 1).unfold(3, side, 1)     # (B, C, top, left, side, side)
    x = windows[torch.arange(len(images), device=images.device), :, top, left]
    x = torch.where(mirror.view(-1, 1, 1, 1), x.flip(3), x)
    return x.contiguous(memory_format=torch.channels_last)


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
        images = crop(images, *place.T, side, (draws[:, 2] < 0.5) & flip)
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
