"""Beyond the paper: what a capsule means, and how robust a network is.

    python -m lab.explore explain RUN               one page of pictures, RUN/explain.png
    python -m lab.explore robustness RUN [RUN...]   error under changes and attacks; the plot of
                                                    all is robustness.png of the first RUN

RUN is a folder of train.py; runs of one model are its seeds.  Errors go to runs/results.jsonl too.
"""
import importlib.util
import json
import math
import statistics
import sys
from functools import partial

import torch
import torch.nn.functional as F

import encapnet
from lab import figures, measure
from lab.config import Parser, number
from lab.data import fit_side, normalised
from lab.digits import POSE, draw_digits
from lab.results import environment, identity, record
from lab.runtime import Problem, count, guarded, say, write_file
from lab.use import load_run


def name_of(run):
    """Model and changed keywords; seeds of one model share it."""
    return " ".join([run.config.model, *(f"{k}={v}" for k, v in run.config.set.items())])


# ---- explain: each panel draws itself into a subfigure and returns its numbers -------------------

def draw_pose(run, figure, drawn=4000):
    images, labels, poses = draw_digits(drawn, train=False)             # files tell no poses
    x = fit_side(images, run.data.side).to(run.device).float() / 255
    capsules = measure.true_capsules(run, x, labels)
    together, alone = measure.explained_variance(capsules, poses, labels)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    shown = left.imshow(alone.numpy(), vmin=0, aspect="auto")
    left.set_yticks(range(len(POSE)), list(POSE))
    left.set(xlabel="dimension", title="squared correlation, each dimension alone")
    figure.colorbar(shown, ax=left)
    right.bar_label(right.bar(list(POSE), together.numpy(), color=figures.COLOURS[0]), fmt="%.2f")
    right.set(ylim=(0, 1), ylabel="$R^2$", title="a linear fit on all dimensions, held-out images")
    return dict(zip(POSE, together.tolist(), strict=True))


def draw_maps(axis, maps, title, columns=1, **options):
    """Maps (n, H, W) on one scale of colours -> what a colour bar needs."""
    from torchvision.utils import make_grid
    grid = make_grid(maps[:, None], columns, padding=1, pad_value=math.nan)[0]
    axis.set_title(title)
    axis.set_axis_off()
    return axis.imshow(grid.cpu().numpy(), **options)


def some(images, n):
    """At most n of them, spread over all: test images of a folder are sorted by class."""
    return images[::math.ceil(len(images) / n)]


def capconvs(run):
    return [m for m in run.net.modules() if isinstance(m, encapnet.CapConv) and m.coefficients]


def draw_coefficients(run, figure, shown=3):
    layers = capconvs(run)
    layers = list(dict.fromkeys([layers[0], layers[len(layers) // 2]]))
    x, numbers = measure.spread_images(run, 60)[0], {}
    first, *axes, density = figure.subplots(1, 2 + 2 * len(layers), width_ratios=[
        *[2] * (1 + 2 * len(layers)), 3])
    draw_maps(first, some(x, shown).mean(1), "image", cmap="gray")
    for k, layer in enumerate(layers):
        u, _ = measure.input_and_output(layer, measure.class_scores, run, x)
        pair = [m.cpu() for m in layer.branches(u)[2:]]                # m1, m2 (B, G, H, W)
        maps = torch.stack([some(m, shown).mean(1) for m in pair])     # (2, shown, H, W)
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
    density.set(title="all types; grey line: initial value", xlabel="coefficient", ylabel="density",
                yticks=[])
    figure.legend(loc="outside lower right", ncols=4, fontsize=8)
    return numbers


def draw_feedback(run, figure, shown=4):
    def lengths(image):                                # mean over types, (B, H, W)
        return image.unflatten(1, (getattr(run.net, "types", 1), -1)).norm(dim=2).mean(1)
    _, pairs = run.net.walk(run.net.stem(normalised(measure.spread_images(run, 200)[0], run.data)))
    axes, found = figure.subplot_mosaic("RB;GB"), {}
    for k, (unit, (low, high)) in enumerate(zip(run.net.units, pairs, strict=True), 1):
        made = unit.generate(high, low.shape[-2:])
        real, generated = lengths(low), lengths(made)
        if k == 1:
            for name, image, title in (("R", real, "lower layer of unit 1, capsule lengths"),
                                       ("G", generated, "the same, generated from the higher")):
                draw_maps(axes[name], some(image, shown), title, columns=shown)
        for label, value in (
                ("correlation, all channels", measure.correlation(low, made)),
                ("correlation, capsule lengths", measure.correlation(real, generated)),
                ("lengths, of another image", measure.correlation(real, generated.roll(1, 0))),
                ("variance between images", measure.variance_between_samples(unit, low).item())):
            found.setdefault(label, {})[f"unit {k}"] = value
    figures.draw_series(
        axes["B"], found, lambda value: (value, math.nan), title="generated against real images",
        xlabel="variance between images: its share in the features that a unit compares;\n"
        "near 0 all images look alike to the unit, and it gives no useful gradient")
    figure.legend(loc="outside lower right", ncols=4, fontsize=8)
    return found


PANELS = [  # title; of which runs; how; height in inches
    ("What the dimensions of the true class's capsule encode",
     lambda run: run.config.dataset == "digits" and not run.net.logits, draw_pose, 2.7),
    ("Master and aide coefficients, mean over types", capconvs, draw_coefficients, 4),
    ("What the feedback generator recovers of the lower layer",
     lambda run: len(getattr(run.net, "units", ())), draw_feedback, 3.6),
]


def explain(run):
    """One page about what a network has learned: RUN/explain.png, its numbers in explain.json."""
    from matplotlib.figure import Figure
    panels = [panel for panel in PANELS if panel[1](run)]
    if not panels:
        raise Problem(f"{run.folder}: a page needs capsules of digits, capConv or feedback units")
    *_, heights = zip(*panels, strict=True)
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
    "shear": ("lean per unit of height", (.15, .3, .45, .6)),
    "noise": ("of a pixel's range (sd)", (.05, .1, .2, .3)),
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

    Attacks climb losses of logits.  The length of a capsule, |s|^2 / (1 + |s|^2), is flat near 1;
    its logit 2 log |s| is not.  It orders the classes alike, so the same images are wrong, and its
    softmax is each class's share of the sum of |s|^2.
    """

    def __init__(self, run):
        super().__init__()
        self.run, self.net = run, run.net
        self.eval()

    def forward(self, x):
        z = measure.class_scores(self.run, x)
        return z if self.net.logits else z.logit(1e-7)


def attacks(model, eps, classes, steps=20):
    """{name: [an attack within eps in L-inf, ...]} of torchattacks.

    APGD, which finds its own step sizes, is the part of AutoAttack that follows the gradient: of
    cross entropy and, where there are three classes, of the difference of logits ratio.
    """
    import torchattacks
    losses = ("ce", "dlr") if classes > 2 else ("ce",)
    return {"FGSM": [torchattacks.FGSM(model, eps)],
            "PGD": [torchattacks.PGD(model, eps, 2.5 * eps / steps, steps)],
            "APGD": [torchattacks.APGD(model, eps=eps, steps=steps, loss=loss) for loss in losses]}


def errors_of(run, n, budgets):
    """Errors in % -> {change or attack: {strength: error}}, told as they are found."""
    x, labels = measure.spread_images(run, n)
    errors, generator = {}, torch.manual_seed(0)                       # alike for every run

    def wrong(x):
        return measure.class_scores(run, x).argmax(1) != labels

    def tell(test, strength, words, wrong):
        error = 100 * wrong.double().mean().item()
        errors.setdefault(test, {})[f"{strength:g}"] = error
        say(f"  {words}: wrong on {error:.1f} % of {count(len(x), 'image')}")
    clean = wrong(x)
    tell("clean", 0, "unchanged", clean)
    for kind, (unit, strengths) in CHANGES.items():
        for s in strengths:
            tell(kind, s, f"{kind}, {s:g} {unit}", wrong(changed(x, kind, s, generator)))
    for eps in budgets:
        for name, tools in attacks(Attacked(run), eps / 255, len(run.data.classes)).items():
            fooled = torch.stack([clean, *(wrong(tool(x, labels)) for tool in tools)]).any(0)
            tell(name, eps, f"{name}, each pixel changed by at most {eps:g}/255", fooled)
    return errors


def mean_sd(values):
    """Mean over seeds, and standard deviation (of one seed: nan)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def draw_robustness(groups, path):
    """One panel per change or attack, one line per model of {model: [errors of a seed, ...]}."""
    units = {**{kind: unit for kind, (unit, _) in CHANGES.items()},
             **dict.fromkeys(("FGSM", "PGD", "APGD"), "eps, in 1/255")}
    figure, axes = figures.canvas(2, 4, width=11, height=2.9)
    for axis, (test, unit) in zip(axes.flat, units.items(), strict=True):
        series = {}
        for name, seeds in groups.items():
            kept = [{**errors["clean"], **errors[test]} for errors in seeds]
            series[name] = {k: [errors[s] for errors in kept] for k, s in enumerate(kept[0])}
        figures.draw_series(axis, series, mean_sd, title=test, xlabel=unit, ylim=(0, 102),
                            ylabel="error (%)")
        axis.set_xticks(range(len(kept[0])), list(kept[0]))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figures.save_figure(figure, path)


def robustness(runs, images, eps):
    """Error of every run under changes and attacks; the first one's robustness.png shows all."""
    groups, usual = {}, {**identity(runs[0].config), "epochs": runs[0].config.epochs}
    for run in runs:
        training = {**identity(run.config), "epochs": run.config.epochs}
        unlike = [f"{name}={value}" for name, value in training.items()
                  if value != usual[name] and name not in ("model", "set", "seed")]
        label = " ".join([name_of(run), *unlike])
        say(f"{run.folder}: {label}")
        errors = errors_of(run, images, eps)
        record({"robustness": name_of(run), "folder": str(run.folder), "seed": run.config.seed,
                "training": training, "images": min(images, len(run.data.test)), "errors": errors,
                "environment": environment(run.device)})               # its command has the flags
        groups.setdefault(label, []).append(errors)
    draw_robustness(groups, runs[0].folder / "robustness.png")


def command(words):
    parser = Parser("python -m lab.explore", description=__doc__)
    parser.add_argument("name", choices=("explain", "robustness"), help="what to do, as above")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--images", type=number(1), default=200, metavar="N",
                        help="test images of robustness (default: 200)")
    parser.add_argument("--eps", nargs="+", type=number(0, float), default=[4, 8, 16, 32, 127.5],
                        metavar="E", help="largest change of a pixel by an attack, in 1/255 "
                        "(default: 4 8 16 32 127.5; a network right at the last masks gradients)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    if given.name == "robustness" and not importlib.util.find_spec("torchattacks"):
        raise Problem("robustness needs torchattacks: pip install torchattacks")
    runs = [load_run(path, device=given.device) for path in given.runs]
    if given.name == "robustness":
        return robustness(runs, given.images, given.eps)
    for run in runs:
        explain(run)


main = partial(guarded, "lab.explore", command)

if __name__ == "__main__":
    sys.exit(main())
