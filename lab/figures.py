"""Drawing: a canvas, a file, the picture of a run, Figures 2 and 4."""
import io
import itertools
import math

import torch

from lab.runtime import say, write_file

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


def draw_run(history, images, answers, labels, classes, path):
    """Loss and error against epochs, and at most 24 test images with the network's answers.

    images: (n, C, H, W) in [0, 1];  answers, labels: class numbers
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 4))
    left, right = top.subplots(1, 2)
    epochs = [e["epoch"] for e in history]
    for axis, names, unit in ((left, ("loss", "feedback"), "loss"),
                              (right, ("train_error", "test_error"), "error (%)")):
        for name, colour in zip(names, COLOURS, strict=False):
            axis.plot(epochs, [e[name] for e in history], ".-", color=colour,
                      label=name.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
        axis.grid(alpha=0.3)
    pictures = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    axes = bottom.subplots(3, 8).flat
    for axis, picture, answer, label in itertools.zip_longest(axes, pictures, answers, labels):
        axis.set_axis_off()
        if picture is not None:
            wrong = answer != label
            axis.imshow(picture)
            truth = f", is {classes[label]}" if wrong else ""
            axis.set_title(classes[answer] + truth, fontsize=8,
                           color=COLOURS[1] if wrong else "black")
    save_figure(figure, path)


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
