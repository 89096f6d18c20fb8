"""Use a trained network: test it again, name images, or load it in another program."""
import dataclasses
from pathlib import Path

import torch

from lab.checkpoint import load_checkpoint, load_weights
from lab.config import Config, merge, tested_on
from lab.data import grey, load_data
from lab.fit import Run, make_model, start
from lab.folders import decode, files_below, is_image
from lab.measure import evaluate
from lab.runtime import Problem, count, pick_device, reason, say


def trained(path, given):
    """The run at a path, with changed fields of Config -> config, checkpoint, network in eval."""
    state = load_checkpoint(path)
    config = Config(**merge(state["config"], given))
    net = make_model(config, len(state["data"]["classes"]), len(state["data"]["mean"]))
    load_weights(net, state, path)
    return config, state, net.to(pick_device(config.device)).eval()


def load_run(path, **given):
    """A trained network and test images: other images will do, normalised as its training images.

    At most one training image is read, except where all are needed to know which are tested or
    readable.
    """
    config, state, net = trained(path, given)
    device, then = start(config), state["data"]
    whole = config.hold_out or config.unreadable == "skip"
    data = load_data(config if whole else dataclasses.replace(config, train_images=1), device)
    if data.classes != then["classes"]:
        raise Problem(f"{data.name} has other classes than the data the network was trained on")
    data = dataclasses.replace(data, mean=then["mean"].to(device), std=then["std"].to(device))
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return Run(config, data, device, net.requires_grad_(False), net, None, {}, folder,
               epoch=state["epoch"], step=state["step"])


def test_only(given):
    """Test error of a trained network, on its own data or, with --data-path, on other like it."""
    run = load_run(given.pop("resume"), **given)
    config, several = run.config, run.config.augment != "none"
    test, crops = evaluate(run, several), "mean over several crops, " * several
    top5 = f"top-5 error {test['top5_error']:.2f} %, " * (len(run.data.classes) > 5)
    steps = f", {count(run.step, 'step')} of the next" if run.step else ""
    say(f"{run.data.name}, {config.model} after {count(run.epoch, 'epoch')}{steps}: "
        f"{tested_on(config)} error {test['error']:.2f} %, {crops}{top5}"
        f"{count(test['images'], 'image')}")


def load(run, **given):
    """A trained network, to use in another program -> net in eval mode, class names, transform.

    run: its folder or checkpoint;  given: fields of Config to change, such as device="cuda"
    transform(image) -> (1, C, H, W), as the network was trained on; the image is a file's path, an
    open file, a PIL image or an array (H, W) or (H, W, 3)
    """
    config, state, net = trained(run, given)
    device = pick_device(config.device)                   # a host program keeps its settings
    mean, std = (state["data"][name].view(-1, 1, 1) for name in ("mean", "std"))

    def transform(image):
        x = decode(image, config.image_size)[None] / 255
        return (((grey(x) if len(mean) == 1 else x) - mean) / std).to(device)
    return net, state["data"]["classes"], transform


@torch.no_grad()
def predict(paths, given):
    """A line an image, or an image of a folder: its classes, the longest (likeliest) first."""
    net, classes, transform = load(given.pop("resume"), **given)
    files = [file for path in paths for file in (
        filter(is_image, files_below(path)) if Path(path).is_dir() else [path])]
    if not files:
        raise Problem(f"no images in {', '.join(paths)[:200]}")
    bad = []
    for file in files:
        try:
            scores = net(transform(file))[0][0]
        except Exception as error:                                       # PIL raises all kinds
            why = getattr(error, "strerror", None) or error
            print(f"{file}: cannot read it ({reason(why)})")
            bad.append(str(file))
            continue
        values, order = (scores.softmax(0) if net.logits else scores).sort(descending=True)
        print(f"{file}:", ", ".join(f"{classes[k]} {value:.3f}" for k, value in zip(
            order[:10].tolist(), values.tolist(), strict=False)))
    if bad:
        told = ", ".join(bad)[:200]
        raise Problem(f"{len(bad)} of {len(files)} images cannot be read: {told}", 1)
