"""What a run is asked to be: Config, whose fields are the flags, and recipes."""
import argparse
import ast
import dataclasses
import functools
import math
import os
from collections import namedtuple

import encapnet
from lab.runtime import Problem, pick_device

# ---- Names: data sets, and models; torchvision has the peers of Table 4 --------------------------

Source = namedtuple("Source", "side flips note")   # of images; may they be mirrored?
DATASETS = {
    "digits": Source(32, False, "printed digits like SVHN's, drawn on the fly"),
    "mnist": Source(32, False, "60,000 + 10,000 grey digits, padded to 32x32"),
    "fashion-mnist": Source(32, True, "60,000 + 10,000 grey clothes, padded"),
    "cifar10": Source(32, True, "50,000 + 10,000 photographs of 10 kinds"),
    "cifar100": Source(32, True, "50,000 + 10,000 photographs of 100 kinds"),
    "svhn": Source(32, False, "73,257 + 26,032 house numbers"),
    "folder": Source(32, True, "your images: DIR/{train,test}/CLASS/*.jpg"),
    "h-imagenet": Source(128, True, "the paper's 200 hard classes of ImageNet"),
    "imagenet": Source(224, True, "ImageNet: DIR/{train,val}/WNID/*.JPEG"),
}
PEERS = {"resnet101": {}, "wide_resnet101_2": {}, "vgg16": {},
         "googlenet": dict(aux_logits=False, init_weights=True)}


# ---- Arguments of a command line -----------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Shows a docstring as it is laid out; what it cannot parse is a Problem."""

    def __init__(self, *words, **options):
        super().__init__(*words, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise Problem(message)


def number(low, kind=int):
    """Argument type: a finite number from low on."""
    def parse(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: must be at least {low}, and finite")
        return kind(text)
    parse.__name__ = "whole number" if kind is int else "number"         # argparse tells it
    return parse


def assignment(text):
    """Argument type: types=8 -> ("types", 8); values are Python literals, else strings."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: must be KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


# ---- Config: a field is a flag.  Defaults are the paper's [Sec. 5, Implementation details] -------

def option(default, group, help, *, free=False, **flag):
    """A field of Config and its flag.  free: no part of a run's identity, may change on resume."""
    metadata = dict(group=group, free=free, flag={"help": help, **flag})
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


data_option = functools.partial(option, group="images [Sec. 5; App. C]")
model_option = functools.partial(option, group="network and loss [Secs. 3, 5; App. A, B]")
train_option = functools.partial(option, group="training [Sec. 5]")
run_option = functools.partial(option, free=True, group="this run: where, how fast")


@dataclasses.dataclass
class Config:
    dataset: str = data_option("digits", help="see --list", choices=DATASETS, metavar="DATASET")
    data_path: str = data_option("data", help="where data sets are or are put", free=True)
    image_size: int = data_option(0, help="side of the square that the network sees (images: short "
                                  "side resized, middle cut out); 0: the data set's")
    train_images: int = data_option(0, help="use only N, always the same ones; 0: all", metavar="N")
    test_images: int = data_option(0, help="the same for test images", metavar="N")
    resample: bool = data_option(False, help="with --train-images: others for every seed")
    hold_out: bool = data_option(False, help="to choose settings by: every tenth training image is "
                                 "tested, not trained on")
    augment: str = data_option("none", choices=("none", "+", "++"), help="+: random crops, "
                               "several per test image; ++: also mirrored (not digits), colour "
                               "jitter, 1.5 times the epochs")
    flip: bool = data_option(False, help="mirror training images (default: for folder and ++, not "
                             "for digits)")
    class_list: str = data_option("", help="h-imagenet: a file of other classes")
    unreadable: str = data_option("stop", help="images that cannot be read; trust: do not look "
                                  "beforehand", free=True, choices=("stop", "skip", "trust"))
    workers: int = data_option(min(8, os.cpu_count() or 1), help="processes that read files",
                               free=True)
    model: str = model_option("encapnet", help="see --list", metavar="MODEL",
                             choices=(*encapnet.MODELS, *PEERS))
    set: dict = model_option({}, help="a keyword of the model, such as types=8; repeatable",
                             type=assignment, action="append", metavar="KEY=VALUE")
    init: str = model_option("", help="start from the weights of another run; where classes "
                             "differ, the class layer starts anew", metavar="RUN")
    loss: str = model_option("", help="default: ce for networks with logits, else margin",
                             choices=("margin", "spread", "spread-fixed", "ce"))
    lam: float = model_option(10.0, help="weight of the feedback divergence")
    recipe: str = train_option("default", choices=("default", "paper", "fast"),
                               help="default: the paper's, but for digits and folder one that "
                               "takes minutes; fast: one that takes an evening")
    optimizer: str = train_option("adam", help="[Table 5]", choices=("adam", "rmsprop", "sgd"))
    lr: float = train_option(1e-4, help="learning rate")
    weight_decay: float = train_option(5e-4, help="L2 penalty")
    batch_size: int = train_option(128, help="over all processes", type=number(1))
    fit_batch: bool = train_option(False, help="batches of at most a twentieth of the images")
    epochs: int = train_option(600, help="the milestones scale with them", free=True)
    steps: int = train_option(0, help="instead of --epochs: as many as make about N steps",
                              metavar="N")
    clip: float = train_option(0.0, help="scale the gradient down to this norm; 0: never",
                               metavar="NORM")
    schedule: str = train_option("steps", help="of the learning rate",
                                 choices=("steps", "one-cycle"))
    milestones: tuple = train_option((200, 300, 400), help="epochs at which it falls",
                                     type=number(1), nargs="+", metavar="EPOCH")
    gamma: float = train_option(0.1, help="factor by which it falls there")
    seed: int = train_option(0, help="of weights, order and augmentation")
    device: str = run_option("auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    amp: bool = run_option(False, help="bfloat16 where it is safe; recipe fast: on a GPU, yes")
    compile: bool = run_option(False, help="torch.compile the model")
    channels_last: bool = run_option(False, help="memory format of images and convolutions; "
                                     "on a CPU mostly the faster one")
    deterministic: bool = run_option(False, help="bit-exact on a GPU too, slower")
    output_dir: str = run_option("", help="folder of the run; goes on if one is there already "
                                 "(default: a new one in runs/)", metavar="DIR")
    resume: str = run_option(None, help="go on with a run as it was asked for: its folder, or the "
                             "newest unfinished in runs/", nargs="?", const="", metavar="PATH")
    save_every: float = run_option(60.0, help="seconds between checkpoints, 0: every step")
    print_freq: int = run_option(50, help="steps between updates of the loss shown", type=number(1))


PAPERS = {name: dict(batch_size=256) for name in ("h-imagenet", "imagenet")}   # else Config's
OURS = {    # settings that learn in minutes on a CPU
    "digits": dict(model="encapnet-small", epochs=2, schedule="one-cycle", lr=3e-3, batch_size=64,
                   lam=0.1, clip=1.0, train_images=16000, test_images=2000, channels_last=True),
    "folder": dict(model="encapnet-small", steps=400, schedule="one-cycle", lr=3e-3, batch_size=64,
                   fit_batch=True, lam=0.1, clip=1.0, augment="+", flip=True, channels_last=True),
}
FAST = dict(schedule="one-cycle", epochs=30, batch_size=512, fit_batch=True, lr=4e-3, clip=1.0)


def merge(*layers):
    """Changes to a Config, the later ones over the earlier; `set` is merged key by key."""
    merged = {"set": {}}
    for layer in layers:
        merged |= {**layer, "set": {**merged["set"], **layer.get("set", {})}}
    return merged


def with_epochs(config, epochs):
    """The Config with so many epochs, its milestones scaled with them."""
    scaled = tuple(m * epochs / max(1, config.epochs) for m in config.milestones)
    whole = tuple(max(1, round(m)) for m in scaled)
    collide = config.schedule == "steps" and len(set(whole)) < len(whole)
    return dataclasses.replace(config, epochs=epochs, milestones=scaled if collide else whole)


def make_config(**given):
    """The Config of a request: given > the recipe > the paper."""
    dataset, recipe = (given.get(name, getattr(Config, name)) for name in ("dataset", "recipe"))
    ours = {"default": OURS.get(dataset, {}), "fast": FAST, "paper": {}}[recipe]
    instead = {"steps": "epochs", "fit_batch": "batch_size"}             # what is given goes before
    ours = {name: value for name, value in ours.items() if instead.get(name) not in given}
    settings = merge(PAPERS.get(dataset, {}), ours)
    config = Config(**merge(settings, given))
    if config.steps and {"epochs", "milestones"} & set(given):
        raise Problem("--steps settles the epochs: no --epochs with it, and no --milestones")
    if config.augment == "++" and "epochs" not in given:                 # our choice
        config.steps, config.epochs = round(1.5 * config.steps), round(1.5 * config.epochs)
    if "milestones" not in given:                                        # one-cycle ignores them
        planned = Config if config.schedule == "steps" else Config(**settings)
        config = with_epochs(dataclasses.replace(config, epochs=planned.epochs), config.epochs)
    source = DATASETS[config.dataset]
    usual = encapnet.MODELS[config.model].image_size if config.model in encapnet.MODELS else 0
    config.image_size = config.image_size or max(source.side, usual)
    if config.model == "encapnet" and config.image_size >= 128:
        config.set = {"stem_stride": 4, **config.set}                    # our choice
    if "flip" not in {**settings, **given}:
        config.flip = config.augment == "++" and source.flips
    if config.recipe == "fast" and "amp" not in given:
        config.amp = pick_device(config.device).type == "cuda"
    logits = config.model in PEERS or encapnet.MODELS[config.model].network.logits
    config.loss = config.loss or ("ce" if logits else "margin")
    if logits and config.loss != "ce":
        raise Problem(f"--loss {config.loss} needs capsule lengths; {config.model} has logits: ce")
    return config


def tested_on(config):
    """What an error is of: test images, or training images held out."""
    return "held-out" if config.hold_out else "test"
