"""Why three choices were made: the measurements behind three figures of results/README.md.

    python -m lab.why em       routing by EM, log densities standardised over j or left as they are
    python -m lab.why burst    the first epoch with the feedback unit at the paper's weight, 10
    python -m lab.why scale    initial weights of BatchNorm in capConv, lengths and errors

Each writes runs/why-NAME.png and its numbers, runs/why-NAME.json.
"""
import json
import math
import statistics
import sys
from functools import partial

import torch
import torch.nn as nn
from torch.nn.utils import get_total_norm

import encapnet
from lab.config import Parser, make_config
from lab.data import load_data, normalised, shuffle
from lab.figures import COLOURS, canvas, draw_series, save_figure
from lab.fit import build_run, classification_loss, start, train_step
from lab.measure import evaluate, first_images, forward
from lab.results import environment
from lab.runtime import RUNS, guarded, say, write_file


def batches(run):
    """What train_step takes of each batch of an epoch, while the run counts steps and epochs."""
    run.net.train()
    order, draws = shuffle(len(run.data.train), run.config.seed, run.epoch)
    chunks = order[:run.steps * run.batch].split(run.batch)
    for images, labels, index in run.data.train.batches(chunks, run.device):
        yield images, labels, draws[index]
        run.step += 1
    run.epoch, run.step = run.epoch + 1, 0


# ---- EM routing ----------------------------------------------------------------------------------

def routing_statistics(votes, activation, mu, R):
    """What an M-step rests on, and what the next E-step compares.

    votes: (B, i, j, d);  activation: (B, i);  mu: (B, j, d);  R: (B, i, j), of that M-step
    -> effective votes of every higher capsule (B, j);  deviation of log p over j (B, i)
    """
    w = R * activation[:, :, None]
    w = w / w.sum(1, keepdim=True)                                       # (B, i, j)
    square = (votes - mu[:, None]).square()                              # (B, i, j, d)
    var = (w[..., None] * square).sum(1, keepdim=True) + 1e-8
    log_p = -(square / var + (2 * math.pi * var).log()).sum(-1) / 2      # (B, i, j)
    return 1 / w.square().sum(1), log_p.std(2, correction=0)


def layer_statistics(layer, u, activation, rounds):
    """Medians of both after 1 .. rounds iterations of one layer -> {name: [number, ...]}."""
    votes, seen = layer.votes(u), []
    for r in range(1, rounds + 1):
        mu, _, R = encapnet.em_routing(votes, activation, layer.beta_v, layer.beta_a, r,
                                       return_coefficients=True, standardised=layer.standardised)
        seen.append([x.median().item() for x in routing_statistics(votes, activation, mu, R)])
    effective, deviation = zip(*seen, strict=True)
    return {"effective votes": effective, "deviation of log p": deviation}


@torch.no_grad()
def em(data_path, rounds=5, images=16):
    """Both layers of an untrained capnet-em (4 types) on MNIST, in both forms -> figure, found."""
    found = {}
    for name, form in (("log p standardised", "both"), ("log p as it is", "cost")):
        config = make_config(dataset="mnist", data_path=data_path, model="capnet-em", device="cpu",
                             set=dict(types=4, standardised=form), train_images=images,
                             test_images=images)
        device = start(config)
        run = build_run(config, load_data(config, device), device)
        for k, layer in enumerate(run.net.train().routed, 1):
            layer.register_forward_hook(
                lambda layer, given, out, label=f"layer {k}, {name}": found.update(
                    {label: layer_statistics(layer, *given, rounds)}))
        run.net(normalised(first_images(run, images)[0], run.data))
    figure, axes = canvas(1, 2, height=3.2)
    for axis, what, of in zip(axes[0], ("effective votes", "deviation of log p"),
                              ("of a capsule", "over j"), strict=True):
        series = {label: dict(enumerate(zip(seen[what], strict=True), 1))
                  for label, seen in found.items()}
        draw_series(axis, series, xlabel="iteration", xticks=range(1, rounds + 1), yscale="log",
                    ylabel=f"{what} {of} (median)")
    axes[0, 0].legend(fontsize=8)
    return figure, found


# ---- The burst -----------------------------------------------------------------------------------

def observed_step(run, images, labels, draws):
    """A training step -> [margin's gradient, weighted divergence's, rate of modules].

    Gradients: their norms over the modules' weights.  rate: how far Adam moves a weight of the
    modules on average, in units of the learning rate; 1 at the first step.
    """
    weights = list(run.net.blocks.parameters())
    scores, feedback = forward(run.model, run.config, normalised(images / 255, run.data))
    loss = classification_loss(run.config, scores, labels, run.progress)
    parts = [torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True)
             for part in (loss, run.config.lam * feedback)]
    norms = [get_total_norm([g for g in part if g is not None]) for part in parts]
    before = torch.cat([w.detach().flatten() for w in weights])
    train_step(run, images, labels, draws)                # looks at the images once more
    moved = torch.cat([w.detach().flatten() for w in weights]) - before
    return [*map(float, norms), float(moved.abs().mean() / run.optimizer.param_groups[0]["lr"])]


def burst(train_images=16000):
    """The default run at lambda = 10, without clipping and with: its first epoch -> figure, found.

    found: {clipped or not: {"margin loss", "lambda x divergence", "rate": [one number per step]}}
    """
    found = {}
    for name, clip in (("not clipped", 0.0), ("clipped to 1", 1.0)):
        config = make_config(lam=10.0, clip=clip, train_images=train_images, device="cpu")
        device = start(config)
        run, seen = build_run(config, load_data(config, device), device), []
        for batch in batches(run):
            seen.append(observed_step(run, *batch))
        found[name] = dict(zip(("margin loss", "lambda x divergence", "rate"),
                               map(list, zip(*seen, strict=True)), strict=True))
    figure, axes = canvas(1, 2, height=3.2)
    left, right = axes[0]
    for (name, seen), style in zip(found.items(), ("-", "--"), strict=True):
        for colour, (what, values) in zip(COLOURS, seen.items(), strict=False):
            (right if what == "rate" else left).plot(values, style, color=colour, lw=1,
                                                     label=f"{what}, {name}")
    left.set(xlabel="step", ylabel="gradient of the modules (norm)", yscale="log")
    right.set(xlabel="step", ylabel="mean move of a weight / learning rate", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure, found


# ---- The scale that squash sees ------------------------------------------------------------------

SCALES = {"1 (torch's default)": lambda d: 1.0, "1.4 / sqrt(d)": lambda d: 1.4 / math.sqrt(d),
          "1 / sqrt(d)": lambda d: 1 / math.sqrt(d)}


def rescale(net, scale):
    """Set BatchNorm's weight in every capConv to a function of its capsule dimension."""
    for layer in net.modules():
        if isinstance(layer, encapnet.CapConv):
            dim = layer.norm.num_features // layer.types
            nn.init.constant_(layer.norm.weight, scale(dim))


@torch.no_grad()
def starting_lengths(net, x):
    """Mean length of the capsules of each dimension in a new network -> {d: length}."""
    seen = {}

    def record(layer, inputs, image):
        capsules = image.unflatten(1, (layer.types, -1))                 # (B, G, d, H, W)
        seen.setdefault(capsules.shape[2], []).append(capsules.norm(dim=2).mean().item())
    for layer in net.train().modules():
        if isinstance(layer, encapnet.CapConv):
            layer.register_forward_hook(record)
    net(x)
    return {dim: statistics.mean(lengths) for dim, lengths in seen.items()}


def scale(train_images=6000, seeds=3):
    """The default run, shorter, from each of SCALES -> figure, found.

    found: {scale: {"lengths": {d: mean length at the start}, "errors": [held-out % of a seed]}}
    """
    found = {name: {"errors": []} for name in SCALES}
    for name, function in SCALES.items():
        for seed in range(seeds):
            config = make_config(train_images=train_images, hold_out=True, seed=seed, device="cpu")
            device = start(config)
            run = build_run(config, load_data(config, device), device)
            rescale(run.net, function)
            while run.epoch < config.epochs:
                for batch in batches(run):
                    train_step(run, *batch)
            found[name]["errors"].append(evaluate(run)["error"])
            say(f"{name}, seed {seed}: held-out error {found[name]['errors'][-1]:.2f} %")
        deep = encapnet.build("encapnet", types=8, feedback=0)
        rescale(deep, function)
        x = normalised(first_images(run, 64)[0], run.data)
        found[name]["lengths"] = starting_lengths(deep, x)
    figure, (axes,) = canvas(1, 2, height=3.2)
    for (name, seen), colour in zip(found.items(), COLOURS, strict=False):
        axes[0].plot(list(seen["lengths"]), list(seen["lengths"].values()), "o-", color=colour,
                     label=name)
    axes[0].set(xlabel="capsule dimension d", ylabel="mean length, untrained", ylim=(0, 1),
                xticks=list(seen["lengths"]), title="EncapNet, 18 layers")
    draw_series(axes[1], {"": {k: seen["errors"] for k, seen in enumerate(found.values())}},
                ylabel="held-out error (%)", xticks=range(len(found)), ylim=(0, None),
                title=f"{train_images:,} digits, mean and 95 % interval of {seeds} seeds")
    axes[1].lines[0].set_linestyle("")                       # scales have no order to connect
    axes[1].set_xticks(range(len(found)), list(found))
    axes[0].legend(fontsize=8, title="BatchNorm's weight")
    return figure, found


def command(words):
    parser = Parser("python -m lab.why", description=__doc__)
    parser.add_argument("name", choices=("em", "burst", "scale"), help="what to measure, as above")
    parser.add_argument("--data-path", default="data", metavar="DIR",
                        help="folder with MNIST, for em (default: data)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    measure = {"em": partial(em, given.data_path), "burst": burst, "scale": scale}[given.name]
    figure, found = measure()
    path = RUNS / f"why-{given.name}.png"
    save_figure(figure, path)
    numbers = {"why": given.name, "found": found, "environment": environment(torch.device("cpu"))}
    write_file(path.with_suffix(".json"), json.dumps(numbers).encode())
    say(f"wrote {path.with_suffix('.json')}")


main = partial(guarded, "lab.why", command)

if __name__ == "__main__":
    sys.exit(main())
