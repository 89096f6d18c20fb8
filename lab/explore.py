"""Beyond the paper: see what a capsule means, and test what the paper only says in words.

    python -m lab.explore explain RUN               one page of pictures, RUN/explain.png
    python -m lab.explore robustness RUN [RUN...]   error under changes and attacks: a table, a plot

RUN is a folder of train.py, of any model and data set.  Several runs of one model are its seeds.
"""
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import encapnet
from lab.checkpoint import run_folder
from lab.config import Config, Parser, config_key, flags, identity, make_config, number
from lab.data import Data, fit_side, load_data, normalised, views
from lab.digits import POSE, draw_digits
from lab.figures import COLOURS, PALETTE, canvas, draw_agreement, save_figure
from lab.fit import agreement, call, classification_loss, environment, make_model, trained
from lab.runtime import Problem, guarded, reason, say, write_file
from lab.tables import markdown

DRAWN = 4000                                                            # digits for parts 1 and 3


class Trained(NamedTuple):
    """A run to look at.   net: in eval mode, its weights fixed;  data: test split, mean, std"""

    folder: Path
    config: Config
    net: torch.nn.Module
    data: Data
    device: torch.device

    @property
    def name(self):
        """Model and changed keywords; seeds of one model share it."""
        usual = self.config.loss == ("ce" if self.net.logits else "margin")
        changes = {**self.config.set, **({} if usual else {"loss": self.config.loss})}
        return " ".join([self.config.model, *(f"{k}={v}" for k, v in changes.items())])

    @property
    def size(self):
        return sum(p.numel() for p in self.net.parameters())

    def scores(self, x):
        """Class scores (B, K) of images (B, C, H, W) in [0, 1]."""
        return call(self.net, self.config, normalised(x, self.data))[0]

    def images(self, n):
        """n test images (n, C, H, W) in [0, 1] and labels, spread over the whole test set."""
        test = self.data.test
        index = torch.linspace(0, len(test) - 1, min(n, len(test)), device=self.device).long()
        images, labels, _ = next(test.batches([index], self.device))
        return next(views(images, self.data.side, False, False)), labels

    def digits(self, n, **options):
        """n drawn test images in [0, 1], labels and poses; poses are what files do not tell."""
        images, labels, poses = draw_digits(n, False, **options)
        images = fit_side(images, self.data.side).to(self.device).float() / 255
        return images, labels.to(self.device), poses.to(self.device)


def load(path, device="auto"):
    config, state, net, device = trained({"resume": str(path), "device": device})
    # Nothing here looks at training images; of digits, which are drawn, one is enough.
    few = dataclasses.replace(config, train_images=int(config.dataset == "digits"))
    data = load_data(few, device)
    if data.classes != state["data"]["classes"]:
        raise Problem(f"{path}: its data set now has other classes than it was trained on")
    data = dataclasses.replace(data, mean=state["data"]["mean"].to(device),
                               std=state["data"]["std"].to(device))
    folder = run_folder(path)
    folder = folder if folder.is_dir() else folder.parent
    return Trained(folder, config, net.requires_grad_(False), data, device)


def untrained(run):
    """The same network before training, BatchNorm set to real images: what comes for nothing."""
    torch.manual_seed(run.config.seed)
    net = make_model(run.config, len(run.data.classes), run.data.channels).to(run.device)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    before = run._replace(net=net.requires_grad_(False).train())
    before.scores(run.images(200)[0])
    net.eval()
    return before


# ------------------------------------------------------------------------------------------------
# explain: each part draws itself into a subfigure -> numbers, and gives them back
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def record(run, x, modules):
    """Inputs and output of modules while the network looks at x -> [(inputs, output), ...]."""
    seen = {}
    hooks = [m.register_forward_hook(lambda m, given, out: seen.update({m: (given, out)}))
             for m in modules]
    run.scores(x)
    for hook in hooks:
        hook.remove()
    return [seen[m] for m in modules]


def features(run, x, labels):
    """16 numbers an image, (B, 16), to read a pose from: the right class capsule, if there is one.

    Of a network without capsules, the leading principal components of what its classifier sees.
    """
    layer, parts = getattr(run.net, "classes", None) or run.net.routed[-1], []
    for part, label in zip(x.split(250), labels.split(250), strict=True):
        (given, *_), out = record(run, part, [layer])[0]
        v = out[0] if isinstance(out, tuple) else out                  # EM: pose, activation
        parts.append(given if run.net.logits else v[torch.arange(len(v)), label])
    z = torch.cat(parts).double().cpu()
    if run.net.logits:
        z = z - z.mean(0)
        z = z @ torch.linalg.svd(z, full_matrices=False)[2][:16].T
    return z


def r_squared(z, factors, labels):
    """Share of each factor's variance that z tells by a linear fit, within a class; class mean.

    z: (B, F);  factors: (B, f) -> all of z, on held-out images (f,);  each of z alone (f, F)
    """
    together, alone = [], []
    for k in labels.unique():
        x, y = z[labels == k], factors[labels == k].double()
        x, y = x - x.mean(0), y - y.mean(0)
        # Where a capsule never uses a dimension, gelsd's rank cut leaves it alone.
        w = torch.linalg.lstsq(x[::2], y[::2], driver="gelsd").solution
        rest = y[1::2] - x[1::2] @ w
        together.append(1 - rest.square().mean(0) / y[1::2].square().mean(0))
        scale = (y.square().sum(0)[:, None] * x.square().sum(0)).clamp(min=1e-30)
        alone.append((y.T @ x).square() / scale)
    return torch.stack(together).mean(0).clamp(min=0), torch.stack(alone).mean(0)


def draw_pose(run, figure, beside):
    x, labels, poses = (t.cpu() for t in run.digits(DRAWN))
    runs = {run.name: run, "untrained": untrained(run)}
    if beside:
        runs[f"{beside.config.model}, {beside.size:,} weights"] = beside
    fits = {name: r_squared(features(r, x.to(r.device), labels), poses, labels)
            for name, r in runs.items()}
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    names = list(POSE)
    shown = left.imshow(fits[run.name][1].numpy(), cmap="viridis", vmin=0, aspect="auto")
    left.set_xticks(range(0, 16, 3))
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("principal component" if run.net.logits else "dimension of the capsule")
    left.set_title("squared correlation, each alone", fontsize=9)
    figure.colorbar(shown, ax=left)
    bars(right, names, {name: fit[0].tolist() for name, fit in fits.items()})
    right.set_title("$R^2$ of a linear fit on 16 numbers, held out", fontsize=9)
    return {name: dict(zip(names, fit[0].tolist(), strict=True)) for name, fit in fits.items()}


def bars(axis, names, series, colours=(COLOURS[0], "0.7", COLOURS[1])):
    """Groups of bars with their values on top.   series: {label: a number a name}"""
    for k, (label, values) in enumerate(series.items()):
        places = [j + .27 * (k - 1) for j in range(len(names))]
        drawn = axis.bar(places, values, .27, label=label, color=colours[k])
        axis.bar_label(drawn, fmt="%.2f", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.axhline(0, color="0.5", lw=.8)
    axis.set_ylim(top=1.3)
    axis.legend(fontsize=7, ncols=3, loc="upper center", columnspacing=1)


def capconvs(run):
    return [m for m in run.net.modules() if isinstance(m, encapnet.CapConv) and m.coefficients]


def draw_coefficients(run, figure, shown=3):
    layers = capconvs(run)
    layers = layers[:1] + layers[len(layers) // 2:][:1] if len(layers) > 1 else layers
    x, numbers = run.images(60)[0], {}
    maps, right = figure.subfigures(1, 2, width_ratios=(4, 1.3))
    axes, spread = maps.subplots(shown, 1 + 2 * len(layers)), right.subplots()
    for row, picture in zip(axes, x, strict=False):
        show_image(row[0], picture)
    for k, (layer, (given, _)) in enumerate(zip(layers, record(run, x, layers), strict=True)):
        pair = [m.cpu() for m in layer.branches(given[0])[2:]]         # m1, m2 (B, G, H, W)
        means = torch.stack([m[:shown].mean(1) for m in pair])         # (2, shown, H, W)
        for c, (m, name) in enumerate(zip(pair, ("m1 master", "m2 aide"), strict=True)):
            label = f"{name}, {m.shape[-1]}x{m.shape[-1]}"
            for axis, picture in zip(axes[:, 1 + 2 * k + c], means[c], strict=True):
                drawn = axis.imshow(picture.numpy(), cmap="cividis", vmin=means.min().item(),
                                    vmax=means.max().item())
                axis.set_axis_off()
            axes[0, 1 + 2 * k + c].set_title(label, fontsize=8)
            spread.hist(m.flatten().numpy(), 60, histtype="step", density=True, label=label,
                        color=COLOURS[c], ls=("-", "--")[k])
            numbers[label] = {"mean": m.mean().item(), "sd": m.std().item(),
                              "negative": (m < 0).double().mean().item()}
        maps.colorbar(drawn, ax=list(axes[:, 2 + 2 * k])).ax.tick_params(labelsize=7)
    spread.axvline(1, color="0.5", lw=.8)
    spread.set_title("all types; grey: where they start", fontsize=8)
    spread.set_yticks([])
    spread.legend(fontsize=6, loc="upper center", bbox_to_anchor=(.5, -.12))
    return numbers


def two_found(scores, labels):
    """Share of images whose best score is one of two labels (B, 2), whose best two are both."""
    best = scores.topk(2).indices
    both = (best.sort(1).values == labels.sort(1).values).all(1)
    return tuple(x.double().mean().item() for x in ((best[:, :1] == labels).any(1), both))


def draw_overlap(run, figure, shown=6):
    if run.config.dataset == "digits":
        x, labels, _ = run.digits(DRAWN // 4, overlap=True)
    else:                                              # an image and the next, 4 pixels off
        one, label = run.images(DRAWN // 4)
        x = torch.maximum(one.roll((-2, -2), (2, 3)), one.roll(1, 0).roll((2, 2), (2, 3)))
        labels = torch.stack([label, label.roll(1)], 1)
        x, labels = x[label != label.roll(1)], labels[label != label.roll(1)]
    with torch.no_grad():
        scores = torch.cat([run.scores(part) for part in x.split(250)])
    top, both = two_found(scores, labels)
    pictures, charts = figure.subplots(2, shown, height_ratios=(3, 2), sharey="row")
    for axis, chart, picture, score, pair in zip(pictures, charts, x, scores, labels, strict=False):
        show_image(axis, picture)
        axis.set_title(" and ".join(map(str, pair.tolist())), fontsize=9)
        chart.bar(range(len(score)), score.tolist(),
                  color=[COLOURS[0] if k in pair else "0.75" for k in range(len(score))])
        chart.set(ylim=(0, 1), xticks=range(len(score)))
        chart.tick_params(labelsize=7)
    figure.supxlabel(f"blue: present.  The longest capsule is one of the two in {100 * top:.0f} % "
                     f"of {len(x)} images, the two longest are the two in {100 * both:.0f} % "
                     "(by chance 20 %, 2 %)", fontsize=9)
    return {"longest_is_present": top, "two_longest_are_both": both}


def draw_polarisation(run, figure):
    x, labels = run.images(64)
    numbers, axes = {}, figure.subplots(1, 2)
    for axis, name, net in zip(axes, ("untrained", "trained"), (untrained(run).net, run.net),
                               strict=True):
        found = numbers[name] = agreement(net, normalised(x, run.data), labels)
        axis.set(title=name, xlabel="cosine of vote and class capsule", ylabel="% of votes (grey)")
        twin = draw_agreement(axis, found)
        twin.set_ylabel("their mean length", color=COLOURS[0])
    return numbers


def match(a, b):
    """Correlation of images (B, C, H, W) with others, mean over B."""
    return encapnet.cosine_cost(*(z.flatten(1)[:, None] - z.flatten(1).mean(1)[:, None, None]
                                  for z in (a, b))).neg().add(1).mean().item()


@torch.no_grad()
def draw_feedback(run, figure, shown=4):
    def strength(image):                               # lengths, mean over types: (B, 1, H, W)
        types = getattr(run.net, "types", 1)
        return image.unflatten(1, (types, -1)).norm(dim=2).mean(1, keepdim=True)
    _, pairs = run.net.walk(run.net.stem(normalised(run.images(200)[0], run.data)))
    units = list(zip(run.net.units, pairs, strict=True))
    both = [(low, unit.generate(high, low.shape[-2:])) for unit, (low, high) in units]
    told = [unit.told_apart(low).item() for unit, (low, _) in units]
    series = {"all channels": [match(a, b) for a, b in both],
              "capsule lengths": [match(strength(a), strength(b)) for a, b in both],
              "lengths, other image": [match(strength(a), strength(b.roll(1, 0)))
                                            for a, b in both]}
    left, right = figure.subfigures(1, 2)
    for row, name, images in zip(left.subplots(2, shown), ("real", "generated"), both[0],
                                 strict=True):
        for axis, image in zip(row, strength(images), strict=False):
            axis.imshow(image[0].cpu().numpy(), cmap="cividis")
            axis.set_title(f"{name}, unit 1", fontsize=8)
            axis.set_axis_off()
    axis = right.subplots()
    names = [f"unit {k + 1}" for k in range(len(units))]
    bars(axis, names, series, (COLOURS[1], COLOURS[0], "0.7"))
    axis.set_title("correlation of generated and real", fontsize=9)
    axis.set_xticks(range(len(units)), [f"{name}\n{share:.2f}" for name, share
                                        in zip(names, told, strict=True)])
    axis.set_xlabel("number: share of variance between samples in the features that it compares;\n"
                    "near 0 all images look alike to the unit, and it feeds nothing back",
                    fontsize=8)
    series["told apart"] = told
    return {label: dict(zip(names, values, strict=True)) for label, values in series.items()}


def show_image(axis, x):
    axis.imshow(x.permute(1, 2, 0).expand(-1, -1, 3).clamp(0, 1).cpu().numpy())
    axis.set_axis_off()


PARTS = [  # title; whether it applies, and why not; how; height in inches
    ("1  What the dimensions of the right class capsule tell",
     lambda r: r.config.dataset == "digits" and hasattr(r.net, "stem"),
     "poses are known of drawn digits only", draw_pose, 2.7),
    ("2  Master and aide coefficients: mean over types of three images",
     capconvs, "no capConv with an aide", draw_coefficients, 3.6),
    ("3  Overlapping digits: lengths of the class capsules",
     lambda r: r.config.dataset in ("digits", "mnist") and not r.net.logits,
     "it needs digits and class capsules", draw_overlap, 3.0),
    ("4  Agreement of votes with the true class (Figure 2)",
     lambda r: hasattr(r.net, "routed"), "no routing with votes", draw_polarisation, 2.8),
    ("5  What the feedback generator recovers of the lower layer",
     lambda r: len(getattr(r.net, "units", ())), "no feedback unit", draw_feedback, 2.8),
]


def training(config):
    """The settings that must agree for a fair comparison."""
    own = ("model", "set", "seed", "loss")
    fields = {**identity(config), "epochs": config.epochs}
    return {name: value for name, value in fields.items() if name not in own}


def unlike(run, other):
    """How run was trained otherwise than other, as flags."""
    theirs = training(other)
    return {name: value for name, value in training(run.config).items() if value != theirs[name]}


def cnn_command(run):
    """What trains a CNN of equal size in the same way; its weights grow as its width squared."""
    c, full = run.config, encapnet.build("cnn-same", len(run.data.classes), run.data.channels)
    width = math.sqrt(run.size / sum(p.numel() for p in full.parameters()))
    usual = make_config(dataset=c.dataset, model="cnn-same", epochs=c.epochs)
    words = flags({"dataset": c.dataset, "data_path": c.data_path, "model": "cnn-same",
                         "set": {"width": round(width, 2)}, "epochs": c.epochs, "seed": c.seed,
                         **{k: v for k, v in unlike(run, usual).items() if k != "dataset"}})
    return f"python train.py {shlex.join(words)}"


def explain(run, beside=None, device="auto"):
    """One page of pictures, RUN/explain.png, and its numbers, RUN/explain.json."""
    from matplotlib.figure import Figure
    run = load(run, device)
    parts = [part for part in PARTS if part[1](run)]
    notes = [f"Left out: {title[:1]}, {why}" for title, fits, why, *_ in PARTS if not fits(run)]
    if beside:
        beside = load(beside, device)
        if not (beside.net.logits and hasattr(beside.net, "stem")) \
                or beside.data.name != run.data.name:
            raise Problem(f"--beside {beside.folder}: {beside.config.model} on {beside.data.name}; "
                          f"give a CNN trained on {run.data.name}")
    if PARTS[0] in parts and not run.net.logits and not beside:
        notes.append(f"Part 1 lacks a CNN of equal size: {cnn_command(run)}, then --beside it")
    if beside and unlike(beside, run.config):
        notes.append(f"The CNN of part 1, {beside.folder}, was trained with other settings: "
                     f"{unlike(beside, run.config)}")
    heights = [.4 + .2 * len(notes), *(part[-1] for part in parts)]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    head, *rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    title = f"{run.name} on {run.data.name}, {run.size:,} weights, {run.config.epochs} epochs"
    head.text(.01, .9, "\n".join([title, *notes]), va="top", fontsize=9)
    numbers = {"run": str(run.folder), "notes": notes,
               "environment": environment(run.device)}
    for row, (title, _, _, draw, _) in zip(rows, parts, strict=True):
        row.suptitle(title, fontsize=11, x=.01, ha="left", weight="bold")
        numbers[title] = draw(run, row, beside) if draw is draw_pose else draw(run, row)
    say("\n".join(notes))
    write_file(run.folder / "explain.json", json.dumps(numbers, indent=1).encode())
    save_figure(figure, run.folder / "explain.png")
    return numbers


# ------------------------------------------------------------------------------------------------
# robustness: changes that keep the label, and changes that an adversary looks for
# ------------------------------------------------------------------------------------------------

CHANGES = {  # name: strengths; each image is changed to one side or the other, by chance
    "rotation": ("degrees", (10, 20, 30, 45)),
    "shift": ("pixels, both ways", (1, 2, 4, 6)),
    "scale": ("log2 of the size", (.25, .5, .75, 1)),
    "shear": ("lean a unit of height", (.15, .3, .45, .6)),
    "noise": ("sd, of 1", (.05, .1, .2, .3)),
}


def changed(x, kind, strength, generator):
    """Images (B, C, H, W) moved, with the border repeated, or noised.   strength: as in CHANGES"""
    B, _, H, W = x.shape
    if kind == "noise":
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        return (x + strength * noise).clamp(0, 1)
    s = strength * (2. * torch.randint(0, 2, (B, 2), generator=generator) - 1)   # (B, 2), +-
    zero, one = torch.zeros(B), torch.ones(B)
    angle = (s[:, 0] * math.pi / 180) if kind == "rotation" else zero
    size = 2 ** s[:, 0] if kind == "scale" else one
    lean = s[:, 0] if kind == "shear" else zero
    shift = s if kind == "shift" else torch.zeros(B, 2)
    theta = torch.stack([                                              # from new place to old
        torch.stack([angle.cos() / size, lean - angle.sin(), -2 * shift[:, 0] / W], 1),
        torch.stack([angle.sin(), angle.cos() / size, -2 * shift[:, 1] / H], 1)], 1)
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def rival(z, labels):
    """Best other class's score less the right one's, (B, K) -> (B,); above 0 is an error."""
    own = F.one_hot(labels, z.shape[1]).bool()
    return z.masked_fill(own, -math.inf).amax(1) - z[own]


def unsquashed(scores):
    """2 log |s| of capsules of length |s|^2 / (1 + |s|^2): grows where squash has gone flat."""
    L = scores.clamp(1e-12, 1 - 1e-6)
    return L.log() - (-L).log1p()


def objectives(run):
    """What attacks climb: each a function of scores (B, K) and labels -> one number an image."""
    def loss(scores, labels):                                          # image by image: B = 1
        config = run.config
        if config.loss == "ce":
            return F.cross_entropy(scores, labels, reduction="none")
        return torch.stack([classification_loss(config, s[None], t[None], 1.0)
                            for s, t in zip(scores, labels, strict=True)])
    open_up = (lambda z: z) if run.net.logits else unsquashed
    return {"loss": loss, "lengths": rival,
            "margin": lambda scores, labels: rival(open_up(scores), labels)}


def slope(run, x, labels, objective):
    """Gradient of an objective on images (B, C, H, W)."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(objective(run.scores(x), labels).sum(), x)[0]


@torch.no_grad()
def fooled(run, x, labels):
    return run.scores(x).argmax(1) != labels


def attack(run, x, labels, objective, eps, steps, restarts, generator):
    """Projected gradient ascent in the L-inf ball of eps, on images that are right -> fooled (B,).

    step size 2.5 eps / steps; each restart begins at random; steps=1: FGSM, from x, a step of eps.
    An image counts as fooled if it is at any step: all that ever was wrong is dropped.
    """
    out = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(restarts):
        left = (~out).nonzero()[:, 0]
        clean, label = x[left], labels[left]
        start = torch.rand(clean.shape, generator=generator).to(x) * 2 - 1
        now = clean if steps == 1 else (clean + eps * start).clamp(0, 1)
        for _ in range(steps):
            if not len(left):
                break
            step = eps if steps == 1 else 2.5 * eps / steps
            now = now + step * slope(run, now, label, objective).sign()
            now = now.clamp(clean - eps, clean + eps).clamp(0, 1)
            wrong = fooled(run, now, label)
            out[left[wrong]] = True
            left, clean, label, now = (t[~wrong] for t in (left, clean, label, now))
    return out


def measure(run, n, steps, restarts, budgets):
    """Errors in % under every change and attack -> {test: {strength: error}}, and the slopes.

    budgets: eps of the attacks, in 1/255.  Attacks start from the images that are right.
    """
    generator = torch.Generator().manual_seed(0)                       # alike for every run
    images, labels = run.images(n)
    def percent(wrong, more=0):
        return 100 * (wrong.sum().item() + more) / len(images)
    wrong = fooled(run, images, labels)
    errors = {"clean": {"0": percent(wrong)}}
    for kind, (_, strengths) in CHANGES.items():
        errors[kind] = {f"{s:g}": percent(fooled(run, changed(images, kind, s, generator), labels))
                        for s in strengths}
    if wrong.all():
        raise Problem(f"{run.folder} has none of {len(images)} images right: nothing to attack")
    x, y, goals = images[~wrong], labels[~wrong], objectives(run)
    settings = {"FGSM": ("loss", 1, 1), "PGD": ("loss", steps, restarts),
                "PGD margin": ("margin", 2 * steps, restarts)}
    for eps in budgets:
        signs = (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x)
        found = {"random signs": fooled(run, (x + eps / 255 * signs).clamp(0, 1), y)}
        for name, (goal, k, r) in settings.items():
            found[name] = attack(run, x, y, goals[goal], eps / 255, k, r, generator)
        found["any attack"] = torch.stack(list(found.values())).any(0)
        for name, out in found.items():
            errors.setdefault(name, {})[f"{eps:g}"] = percent(out, wrong.sum().item())
    # With half the range of a pixel allowed any network must fall, or its gradient is masked.
    out = attack(run, x, y, goals["margin"], .5, 2 * steps, 1, generator)
    errors["PGD margin, half the range:"] = {"127.5": percent(out, wrong.sum().item())}
    steep = {name: slope(run, x, y, goal).abs().flatten(1).amax(1) for name, goal in goals.items()}
    return errors, {name: {"vanishing_percent": 100 * (g < 1e-6).double().mean().item(),
                           "median_largest": g.median().item()} for name, g in steep.items()}


def mean_sd(values):
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def tables(groups):
    """Markdown: errors, and whether gradients vanish.   groups: {model: [line, ...]}"""
    heads = [f"{name} ({len(lines)})" for name, lines in groups.items()]
    first = next(iter(groups.values()))[0]
    rows = [[f"{test} {strength}".removesuffix(" 0"),
             *(mean_sd([line["errors"][test][strength] for line in lines])
               for lines in groups.values())]
            for test, row in first["errors"].items() for strength in row]
    slopes = [[f"{objective}: % of images with no gradient",
               *(mean_sd([line["gradients"][objective]["vanishing_percent"] for line in lines])
                 for lines in groups.values())] for objective in first["gradients"]]
    return "\n\n".join(markdown([head, *heads], body) for head, body in (
        ("error in % (seeds)", rows), ("gradient on right test images", slopes)))


def draw_robustness(groups, path):
    """A panel a change or attack, a line a model, bars the sd over seeds."""
    units = {**{k: unit for k, (unit, _) in CHANGES.items()},
             **dict.fromkeys(("FGSM", "PGD", "PGD margin"), "eps, in 1/255")}
    figure, axes = canvas(2, 4, width=11, height=2.9)
    for axis, (test, unit) in zip(axes.flat, units.items(), strict=True):
        for k, (name, lines) in enumerate(groups.items()):
            kept = [{"0": line["errors"]["clean"]["0"], **line["errors"][test]} for line in lines]
            points = [float(s) for s in kept[0]]
            values = [[line[s] for line in kept] for s in kept[0]]
            bars = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            axis.errorbar(points, [statistics.mean(v) for v in values], bars, capsize=2, ms=4,
                          label=name, color=PALETTE[k % 7], marker="osD^vPX"[k % 7])
        axis.set(title=test, xlabel=unit, ylim=(0, 102))
        axis.grid(alpha=.3)
    for row in axes:
        row[0].set_ylabel("error (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def robustness(runs, images=300, steps=20, restarts=2, eps=(1, 2, 4, 8), output_dir=None,
               device="auto"):
    """A table and a plot, and a line a run in robustness.jsonl, into output_dir.   eps: in 1/255"""
    runs = [load(path, device) for path in runs]
    first, groups, seeds = runs[0], {}, set()
    for run in runs:
        if run.data.name != first.data.name:
            raise Problem(f"{run.folder} was trained on {run.data.name}, "
                          f"{first.folder} on {first.data.name}")
        if unlike(run, first.config):
            say(f"note: {run.folder} was not trained as {first.folder} was: no fair comparison")
        if (config_key(run.config), run.config.seed) in seeds:
            raise Problem(f"{run.folder}: seed {run.config.seed} of {run.name} a second time")
        seeds.add((config_key(run.config), run.config.seed))
    folder = Path(output_dir or (first.folder if len(runs) == 1 else first.folder.parent))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"--output-dir {folder}: {reason(error)}") from error
    for run in runs:
        since = time.time()
        try:
            errors, gradients = measure(run, images, steps, restarts, eps)
        except Problem as weak:
            say(f"left out: {weak}")
            continue
        line = {"robustness": run.name, "data": run.data.name, "seed": run.config.seed,
                "training": training(run.config), "parameters": run.size,
                "images": min(images, len(run.data.test)),
                "attacks": {"norm": "L-inf", "steps": steps, "restarts": restarts,
                            "step_size": "2.5 eps / steps", "margin_steps": 2 * steps},
                "errors": errors, "gradients": gradients, "seconds": round(time.time() - since, 1),
                "folder": str(run.folder), "environment": environment(run.device)}
        changes = "".join(f" {k}={v}" for k, v in unlike(run, first.config).items())
        groups.setdefault(run.name + changes, []).append(line)
        say(f"{run.folder}: {run.name}, seed {run.config.seed}, {line['seconds']:.0f} s")
    if not groups:
        raise Problem("no run is left to compare")
    text = "".join(json.dumps(line) + "\n" for lines in groups.values() for line in lines)
    write_file(folder / "robustness.jsonl", text.encode())
    say(f"\n{first.data.name}, {line['images']} test images.  L-inf attacks, eps in 1/255: PGD "
        f"climbs the training loss, {steps} steps of 2.5 eps / {steps}, {restarts} restarts; PGD "
        f"margin the margin of unsquashed lengths or of logits, {2 * steps} steps of half that.\n")
    say(tables(groups))
    say(f"\nwrote {folder / 'robustness.jsonl'}")
    draw_robustness(groups, folder / "robustness.png")
    return groups


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def parse(arguments):
    parser = Parser("explore", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{explain,robustness}")
    one = commands.add_parser("explain", help="one page of pictures in the run's folder")
    one.add_argument("run", metavar="RUN")
    one.add_argument("--beside", metavar="RUN", help="a CNN to compare with in part 1")
    many = commands.add_parser("robustness", help="error under changes and attacks")
    many.add_argument("runs", nargs="+", metavar="RUN")
    for name, default, help in (("images", 300, "test images"), ("steps", 20, "of PGD"),
                                ("restarts", 2, "of PGD")):
        many.add_argument(f"--{name}", type=number(1), default=default, metavar="N",
                          help=f"{help} (default: {default})")
    many.add_argument("--eps", nargs="+", type=number(0, float), default=[1, 2, 4, 8],
                      metavar="E", help="of attacks, in 1/255 (default: 1 2 4 8)")
    many.add_argument("--output-dir", metavar="DIR", help="(default: beside the runs)")
    for command in (one, many):
        command.add_argument("--device", default="auto", help="(default: auto)")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def command(command, debug, **given):
    {"explain": explain, "robustness": robustness}[command](**given)


def main(arguments=None):
    """-> exit code: 0, 2 for bad input, 1 for a failure."""
    return guarded("explore", lambda words: command(**vars(parse(words))), arguments)


if __name__ == "__main__":
    sys.exit(main())
