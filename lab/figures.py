"""Drawing: a canvas, names in any script, a file, the picture of a run, Figures 2 and 4."""
import math
import statistics
import warnings

import torch

from lab.runtime import say

COLOURS = (                # Okabe and Ito's, colour-blind safe
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TYPEFACES = (              # of text: of those installed, the first that has a character draws it
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei",     # Linux
    "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Segoe UI Symbol",            # Windows
    "Arial Unicode MS", "Hiragino Sans GB", "Noto Emoji")                           # macOS; any


def canvas(rows, columns, width=10, height=3.2, **options):
    """A figure outside pyplot's global state, and its axes (rows, columns)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def shortened(name, longest):
    """A user's words, cut to so many characters; a $ in them begins no formula."""
    name = name.encode(errors="replace").decode()         # of a file name that is not UTF-8
    name = name if len(name) <= longest else name[:longest - 1] + "…"
    return name.replace("$", r"\$")


def save_figure(figure, path):
    """Write a PNG; characters that no installed typeface has become boxes."""
    from matplotlib.font_manager import fontManager
    from matplotlib.text import Text
    installed = [name for name in TYPEFACES if name in fontManager.get_font_names()]
    for text in figure.findobj(Text):
        text.set_family(installed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=110, format="png")
    say(f"wrote {path}")


def whole_epochs(axis):
    """Ticks of an axis of epochs: whole numbers, and one tick where there is one epoch."""
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def draw_run(title, chance, history, images, answers, labels, classes, path):
    """Loss and error against epochs, and at most 24 test images with the network's answers.

    chance: an error in %;  history: entries of the log;  images: (n, C, H, W) in [0, 1]
    answers, labels: class numbers
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    figure.suptitle(shortened(title, 120), fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 4.5))
    left, right = top.subplots(1, 2)
    losses = ("loss", "feedback") if any(e["feedback"] for e in history) else ("loss",)
    right.axhline(chance, color="0.5", ls="--", lw=1, label="chance")
    for axis, names, unit in ((left, losses, "loss"),
                              (right, ("train_error", "test_error"), "error (%)")):
        for name, colour in zip(names, COLOURS, strict=False):
            axis.plot([e["epoch"] for e in history], [e[name] for e in history], ".-",
                      color=colour, label=name.replace("_", " "))
        axis.set_ylabel(unit)
        whole_epochs(axis)
        axis.legend()
        axis.grid(alpha=0.3)
    bottom.suptitle("test images: predicted class; if it is wrong, predicted / true", fontsize=10)
    axes = bottom.subplots(3, 8).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, answer, label in zip(axes, images, answers, labels, strict=False):
        wrong = answer != label
        names = [shortened(classes[k], 14) for k in ([answer, label] if wrong else [answer])]
        caption = (" / " if len("".join(names)) < 12 else " /\n").join(names)
        axis.set_title(caption, fontsize=8, color=COLOURS[1] if wrong else "black")
        axis.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).clamp(0, 1).numpy())
    save_figure(figure, path)


def draw_figure2(lines, title, path):
    """Rows: routings; columns: moments.  Grey: % of votes, blue: their mean length.   [Fig. 2]"""
    lines = {name: found[0]["moments"] for name, found in lines.items()}
    figure, axes = canvas(len(lines), max(map(len, lines.values())), height=2.6, sharey=True)
    figure.suptitle(shortened(title, 120), fontsize=10)
    for row, (name, moments) in zip(axes, lines.items(), strict=True):
        for axis, moment in zip(row, moments, strict=False):
            shares, bins = moment["percent"], len(moment["percent"])
            centres = [(2 * k + 1) / bins - 1 for k in range(bins)]
            axis.bar(centres, shares, 2 / bins, color="0.75")
            axis.set_title(f"{name}, epoch {moment['epoch']}", fontsize=9)
            twin = axis.twinx()
            twin.plot(centres, [length if share else math.nan for length, share in zip(
                moment["length"], shares, strict=True)], color=COLOURS[0])
            twin.set_ylim(bottom=0)
        row[0].set_ylabel("% of votes (grey)", fontsize=8)
        twin.set_ylabel("length of votes (blue)", fontsize=8)
    figure.supxlabel("cosine of vote and class capsule", fontsize=8)
    save_figure(figure, path)


def draw_figure4(lines, title, path):
    """Training loss without and with divergence, one panel per network.   [Fig. 4]"""
    figure, axes = canvas(1, 2)
    figure.suptitle(shortened(title, 120), fontsize=10)
    for name, found in lines.items():
        axis = axes[0, int(name.startswith("ResNet"))]
        loss = torch.tensor([r["curves"]["loss"] for r in found]).mean(0).tolist()
        axis.plot(range(1, len(loss) + 1), loss, ".-" if "OT" in name else ".--",
                  color=COLOURS["OT" in name], label=name)
        axis.set_ylabel("classification loss")
        whole_epochs(axis)
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def interval(values):
    """Mean of a sample, and half of its 95 % confidence interval (Student's t; one value: nan)."""
    from scipy.stats import t
    n = len(values)
    if n < 2:
        return values[0], math.nan
    return statistics.mean(values), t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)


def draw_series(axis, series, bars=interval, **labels):
    """Lines with bars.   series: {label: {x: [values]}};  bars: values -> middle, half a bar"""
    for k, (label, points) in enumerate(series.items()):
        middles, halves = zip(*map(bars, points.values()), strict=True)
        axis.errorbar(list(points), middles, halves, marker="osD^vPX<>"[k % 9], ms=4, capsize=2,
                      color=COLOURS[k % 7], label=label)
    axis.set(**labels)
    axis.grid(alpha=0.3)
