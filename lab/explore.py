"""Beyond the paper: see what a capsule means, and test what the paper only says in words.

    python -m lab.explore explain RUN               one page of pictures, RUN/explain.png
    python -m lab.explore robustness RUN [RUN...]   error under changes and attacks; the plot of
                                                    all is robustness.png of the first RUN

RUN is a folder of train.py, of any model and data set; runs of one model are its seeds.  Every
run's errors go to runs/results.jsonl too.
"""
import importlib.util
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import encapnet
from lab import figures
from lab.config import Parser, identity, number
from lab.data import fit_side, normalised
from lab.digits import POSE, draw_digits
from lab.fit import Run, environment, record
from lab.measure import forward, input_and_output, spread_images
from lab.runtime import Problem, count, guarded, say, write_file
from lab.use import test_data, trained


def load(path, device="auto"):
    """A run of train.py, its folder or a checkpoint in it: test images and a network in eval."""
    config, state, net, device = trained({"resume": str(path), "device": device})
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    data = test_data(config, state, device)
    return Run(config, data, device, net.requires_grad_(False), net, None, {}, folder)


def name_of(run):
    """Model and changed keywords; seeds of one model share it."""
    return " ".join([run.config.model, *(f"{k}={v}" for k, v in run.config.set.items())])


def scores(run, x):
    """Class scores (B, K) of images (B, C, H, W) in [0, 1]."""
    return forward(run.net, run.config, normalised(x, run.data))[0]


# ---- explain: each panel draws itself into a subfigure -> numbers, and gives them back -----------

def features(run, x, labels):
    """The capsule of each image's right class, whose length is the score: (B, d)."""
    layer, parts = getattr(run.net, "classes", None) or run.net.routed[-1], []
    for part, label in zip(x.split(250), labels.split(250), strict=True):
        _, v = input_and_output(layer, scores, run, part)
        parts.append(v[torch.arange(len(v)), label])
    return torch.cat(parts).cpu().double()


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
        alone.append(F.cosine_similarity(y.T[:, None], x.T, dim=2, eps=1e-15).square())
    return torch.stack(together).mean(0).clamp(min=0), torch.stack(alone).mean(0)


def draw_pose(run, figure, drawn=4000):
    images, labels, poses = draw_digits(drawn, train=False)             # files tell no poses
    x = fit_side(images, run.data.side).to(run.device).float() / 255
    together, alone = r_squared(features(run, x, labels), poses, labels)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    shown = left.imshow(alone.numpy(), vmin=0, aspect="auto")
    left.set_yticks(range(len(POSE)), list(POSE))
    left.set(xlabel="dimension", title="squared correlation, each alone")
    figure.colorbar(shown, ax=left)
    right.bar_label(right.bar(list(POSE), together.numpy(), color=figures.COLOURS[0]), fmt="%.2f")
    right.set(ylim=(0, 1), ylabel="$R^2$", title="a linear fit on all of them, held out")
    return dict(zip(POSE, together.tolist(), strict=True))


def draw_maps(axis, maps, title, columns=1, **options):
    """Maps (n, H, W) on one scale of colours -> what a colour bar needs."""
    from torchvision.utils import make_grid
    grid = make_grid(maps[:, None], columns, padding=1, pad_value=math.nan)[0]
    axis.set_title(title)
    axis.set_axis_off()
    return axis.imshow(grid.cpu().numpy(), **options)


def capconvs(run):
    return [m for m in run.net.modules() if isinstance(m, encapnet.CapConv) and m.coefficients]


def draw_coefficients(run, figure, shown=3):
    layers = capconvs(run)
    layers = list(dict.fromkeys([layers[0], layers[len(layers) // 2]]))
    x, numbers = spread_images(run, 60)[0], {}
    first, *axes, density = figure.subplots(1, 2 + 2 * len(layers), width_ratios=[
        *[2] * (1 + 2 * len(layers)), 3])
    draw_maps(first, x[:shown].mean(1), "image", cmap="gray")
    for k, layer in enumerate(layers):
        u, _ = input_and_output(layer, scores, run, x)
        pair = [m.cpu() for m in layer.branches(u)[2:]]                # m1, m2 (B, G, H, W)
        maps = torch.stack([m[:shown].mean(1) for m in pair])          # (2, shown, H, W)
        two = axes[2 * k:2 * k + 2]
        for axis, m, of, name in zip(two, pair, maps, ("m1 master", "m2 aide"), strict=True):
            label = f"{name}, {m.shape[-1]}x{m.shape[-1]}"
            drawn = draw_maps(axis, of, label, vmin=maps.min(), vmax=maps.max())
            density.hist(m.flatten().numpy(), 60, histtype="step", density=True, label=label,
                         color=figures.COLOURS[len(numbers)])
            numbers[label] = {"mean": m.mean().item(), "sd": m.std().item(),
                              "negative": (m < 0).double().mean().item()}
        figure.colorbar(drawn, ax=two)
    density.axvline(1, color="0.5", lw=.8)
    density.set(title="all types; grey: the start", xlabel="coefficient", ylabel="density",
                yticks=[])
    figure.legend(loc="outside lower right", ncols=4, fontsize=8)
    return numbers


def match(a, b):
    """Correlation of images (B, ...) with their counterparts, mean over B."""
    a, b = (z.flatten(1) - z.flatten(1).mean(1, keepdim=True) for z in (a, b))
    return F.cosine_similarity(a, b).mean().item()


def draw_feedback(run, figure, shown=4):
    def lengths(image):                                # mean over types, (B, H, W)
        return image.unflatten(1, (getattr(run.net, "types", 1), -1)).norm(dim=2).mean(1)
    _, pairs = run.net.walk(run.net.stem(normalised(spread_images(run, 200)[0], run.data)))
    units = list(zip(run.net.units, pairs, strict=True))
    both = [(low, unit.generate(high, low.shape[-2:])) for unit, (low, high) in units]
    series = {"all channels": [match(a, b) for a, b in both],
              "capsule lengths": [match(lengths(a), lengths(b)) for a, b in both],
              "lengths, other image": [match(lengths(a), lengths(b).roll(1, 0)) for a, b in both],
              "told apart": [unit.told_apart(low).item() for unit, (low, _) in units]}
    axes, names = figure.subplot_mosaic("RB;GB"), [f"unit {k + 1}" for k in range(len(units))]
    for axis, image, what in zip((axes["R"], axes["G"]), both[0], ("real", "generated"),
                                 strict=True):
        draw_maps(axis, lengths(image)[:shown], f"{what}, unit 1", columns=shown)
    bars = axes["B"]
    for k, (label, values) in enumerate(series.items()):
        places = [j + .2 * (k - 1.5) for j in range(len(units))]
        drawn = bars.bar(places, values, .2, label=label, color=figures.COLOURS[k])
        bars.bar_label(drawn, fmt="%.2f", fontsize=7, rotation=90, padding=3)
    bars.set_xticks(range(len(units)), names)
    bars.margins(y=.3)                                                 # room for the numbers
    bars.axhline(0, color="0.5", lw=.8)
    bars.set(ylabel="correlation, or share",
             title="correlation of generated and real; share told apart", xlabel=
             "told apart: share of variance between samples in the features that a unit compares;\n"
             "near 0 all images look alike to the unit, and it feeds nothing back")
    figure.legend(loc="outside lower right", ncols=4, fontsize=8)
    return {label: dict(zip(names, values, strict=True)) for label, values in series.items()}


PANELS = [  # title; of which runs; how; height in inches
    ("What the dimensions of the right class capsule tell",
     lambda run: run.config.dataset == "digits" and not run.net.logits, draw_pose, 2.7),
    ("Master and aide coefficients, mean over types", capconvs, draw_coefficients, 4),
    ("What the feedback generator recovers of the lower layer",
     lambda run: len(getattr(run.net, "units", ())), draw_feedback, 3.2),
]


def explain(run):
    """One page about what a network has learned: RUN/explain.png, its numbers in explain.json."""
    from matplotlib.figure import Figure
    panels = [panel for panel in PANELS if panel[1](run)]
    if not panels:
        raise Problem(f"{run.folder}: a page needs capsules of digits, capConv or feedback units")
    heights = [height for *_, height in panels]
    figure = Figure(figsize=(13, .4 + sum(heights)), layout="constrained")
    title = f"{run.folder}: {name_of(run)} on {run.data.name}, epochs={run.config.epochs}"
    figure.suptitle(figures.shortened(title, 150), fontsize=10)
    numbers = {"run": str(run.folder), "environment": environment(run.device)}
    rows = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for k, (row, (title, _, draw, _)) in enumerate(zip(rows, panels, strict=True), 1):
        row.suptitle(f"{k}  {title}", x=.01, ha="left", weight="bold")
        numbers[title] = draw(run, row)
    write_file(run.folder / "explain.json", json.dumps(numbers, indent=1).encode())
    figures.save_figure(figure, run.folder / "explain.png")


# ---- robustness: changes that keep the label, and changes that an adversary looks for ------------

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
    angle = s[:, 0].deg2rad() * (kind == "rotation")
    size = 2 ** (s[:, 0] * (kind == "scale"))
    lean = s[:, 0] * (kind == "shear")
    shift = s * (kind == "shift")
    theta = torch.stack([                                              # from new place to old
        torch.stack([angle.cos() / size, lean - angle.sin(), -2 * shift[:, 0] / W], 1),
        torch.stack([angle.sin(), angle.cos() / size, -2 * shift[:, 1] / H], 1)], 1)
    grid = F.affine_grid(theta.to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Attacked(torch.nn.Module):
    """What an attack sees of a run: images in [0, 1] -> logits (B, K).

    Attacks are made for logits, and the length of a capsule is a probability: squash is flat where
    it is near 1.  With length |s|^2 / (1 + |s|^2) its logit is 2 log |s|, which orders the classes
    as lengths do and whose softmax is each class's share of the sum of |s|^2.
    """

    def __init__(self, run):
        super().__init__()
        self.run, self.net = run, run.net
        self.eval()

    def forward(self, x):
        z = scores(self.run, x)
        return z if self.net.logits else z.logit(1e-7)


def attacks(model, eps, steps, classes):
    """{name: [an attack within eps in L-inf, ...]}, those of torchattacks.

    APGD chooses its own step sizes.  On cross entropy and on the difference of logits ratio, which
    needs three classes, it is the half of AutoAttack that follows gradients.
    """
    import torchattacks
    losses = ("ce", "dlr") if classes > 2 else ("ce",)
    return {"FGSM": [torchattacks.FGSM(model, eps)],
            "PGD": [torchattacks.PGD(model, eps, 2.5 * eps / steps, steps)],
            "APGD": [torchattacks.APGD(model, eps=eps, steps=steps, loss=loss) for loss in losses]}


def measure(run, n, steps, budgets):
    """Errors in % -> {change or attack: {strength: error}}, each told when it is known.

    budgets: eps, in 1/255;  an image on which the network was wrong within one is not attacked
    again by the same attack within a larger one
    """
    x, labels = spread_images(run, n)
    model, errors, generator = Attacked(run), {}, torch.Generator().manual_seed(0)
    torch.manual_seed(0)                                               # alike for every run

    def wrong(x, labels):
        return scores(run, x).argmax(1) != labels

    def tell(test, strength, words, wrong):
        error = 100 * wrong.double().mean().item()
        errors.setdefault(test, {})[f"{strength:g}"] = error
        say(f"  {words}: wrong on {error:.1f} % of {count(len(x), 'image')}")
    clean = wrong(x, labels)
    tell("clean", 0, "unchanged", clean)
    for kind, (unit, strengths) in CHANGES.items():
        for s in strengths:
            moved = changed(x, kind, s, generator)
            tell(kind, s, f"{kind}, {s:g} {unit}", wrong(moved, labels))
    found = {}
    for eps in sorted(budgets):
        for name, tools in attacks(model, eps / 255, steps, len(run.data.classes)).items():
            fooled = found.setdefault(name, clean.clone())
            for tool in tools:
                left = (~fooled).nonzero()[:, 0]
                if len(left):
                    fooled[left] = wrong(tool(x[left], labels[left]), labels[left])
            tell(name, eps, f"{name}, no pixel changed by more than {eps:g}/255", fooled)
        tell("any attack", eps, f"one of them, {eps:g}/255", torch.stack([*found.values()]).any(0))
    return errors


def mean_sd(values):
    """Mean over seeds, and standard deviation (of one seed: nan)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def draw_robustness(groups, path):
    """One panel per change or attack, one line per model, bars the sd over seeds.

    groups: {model: [errors of a seed, ...]};  strengths stand side by side, from none
    """
    units = {**{kind: unit for kind, (unit, _) in CHANGES.items()},
             **dict.fromkeys(("FGSM", "PGD", "APGD"), "eps, in 1/255")}
    figure, axes = figures.canvas(2, 4, width=11, height=2.9)
    for axis, (test, unit) in zip(axes.flat, units.items(), strict=True):
        series = {}
        for name, seeds in groups.items():
            kept = [{**errors["clean"], **errors[test]} for errors in seeds]
            series[name] = {k: [errors[s] for errors in kept] for k, s in enumerate(kept[0])}
        figures.draw_series(axis, series, mean_sd, title=test, xlabel=unit, ylim=(0, 102))
        axis.set_xticks(range(len(kept[0])), list(kept[0]))
    for row in axes:
        row[0].set_ylabel("error (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figures.save_figure(figure, path)


def robustness(runs, images, steps, eps):
    """Error of every run under changes and attacks; the first one's robustness.png shows all."""
    groups, trainings = {}, [{**identity(run.config), "epochs": run.config.epochs} for run in runs]
    for run, training in zip(runs, trainings, strict=True):
        unlike = [f"{name}={value}" for name, value in training.items()
                  if value != trainings[0][name] and name not in ("model", "set", "seed")]
        label = " ".join([name_of(run), *unlike])
        say(f"{run.folder}: {label}")
        errors = measure(run, images, steps, eps)
        record({"robustness": name_of(run), "folder": str(run.folder), "seed": run.config.seed,
                "training": training, "images": min(images, len(run.data.test)), "errors": errors,
                "environment": environment(run.device)})               # its command has the flags
        groups.setdefault(label, []).append(errors)
    draw_robustness(groups, runs[0].folder / "robustness.png")


# ---- Command line --------------------------------------------------------------------------------

def command(words):
    parser = Parser("python -m lab.explore", description=__doc__)
    parser.add_argument("name", choices=("explain", "robustness"), help="what to do, as above")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    tests = parser.add_argument_group("robustness")
    for name, default, text in (("images", 200, "test images"), ("steps", 20, "of PGD and APGD")):
        tests.add_argument(f"--{name}", type=number(1), default=default, metavar="N",
                           help=f"{text} (default: {default})")
    tests.add_argument("--eps", nargs="+", type=number(0, float), default=[4, 8, 16, 32, 127.5],
                       metavar="E", help="how far an attack may change a pixel, in 1/255 (default: "
                       "4 8 16 32 127.5; within the last, half the range, every network must fall, "
                       "or its gradient is masked)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    if given.name == "robustness" and not importlib.util.find_spec("torchattacks"):
        raise Problem("robustness needs torchattacks: pip install torchattacks")
    runs = [load(path, given.device) for path in given.runs]
    if given.name == "robustness":
        return robustness(runs, given.images, given.steps, given.eps)
    for run in runs:
        explain(run)


main = partial(guarded, "lab.explore", command)

if __name__ == "__main__":
    sys.exit(main())
