"""Three questions and their measurements: the figures behind the essays of results/README.md.

    python -m lab.why em       routing by EM, what competes over j standardised or not
    python -m lab.why burst    the first epoch with the feedback unit at the paper's weight, 10
    python -m lab.why steps    from a ResNet to EncapNet, one change at a time; lengths at the start

Each writes runs/why-NAME.png and its numbers, runs/why-NAME.json.  `em` takes ten minutes of a
core, `steps` two hours; that one writes its numbers after every run, and runs only what the file
lacks.
"""
import json
import math
import statistics
import sys
from functools import partial
from unittest.mock import patch

import torch
import torch.nn as nn
from torch.nn.utils import get_total_norm

import encapnet
from lab.config import Parser, make_config
from lab.data import load_data, normalised, shuffle
from lab.figures import COLOURS, canvas, draw_series, interval, save_figure
from lab.fit import build_run, losses, make_optimizer, start, train_step
from lab.measure import evaluate, first_images
from lab.paper import ROUTING, SMALL, model_row, row_config
from lab.results import environment
from lab.runtime import RUNS, guarded, say, write_file


def new_run(config):
    """A Run of its own device, data and network, not yet begun; in no folder."""
    device = start(config)
    return build_run(config, load_data(config, device), device)


def batches(run):
    """What train_step takes of each batch of an epoch, while the run counts steps and epochs."""
    run.net.train()
    order, draws = shuffle(len(run.data.train), run.config.seed, run.epoch)
    chunks = order[:run.steps * run.batch].split(run.batch)
    for images, labels, index in run.data.train.batches(chunks, run.device):
        yield images, labels, draws[index]
        run.step += 1
    run.epoch, run.step = run.epoch + 1, 0


def errors_after_training(run):
    """Train to the end -> errors in %: of the images to test on; of training, in the last epoch."""
    while run.epoch < run.config.epochs:
        wrong = [train_step(run, *batch)[2] for batch in batches(run)]
    return evaluate(run)["error"], 100 * torch.stack(wrong).mean().item()


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
                                       return_coefficients=True)
        seen.append([x.median().item() for x in routing_statistics(votes, activation, mu, R)])
    effective, deviation = zip(*seen, strict=True)
    return {"effective votes": effective, "deviation of log p": deviation}


FORMS = {"standardised": encapnet.standardise, "not standardised": lambda x: x}


@torch.no_grad()
def em_statistics(data_path, rounds, images):
    """Of both layers of an untrained capnet-em (4 types) on MNIST, in both forms."""
    found = {}
    for name, standardise in FORMS.items():
        run = new_run(make_config(dataset="mnist", data_path=data_path, model="capnet-em",
                                  device="cpu", set=dict(types=4), train_images=images,
                                  test_images=images))
        for k, layer in enumerate(run.net.train().routed, 1):
            layer.register_forward_hook(
                lambda layer, given, out, label=f"layer {k}, {name}": found.update(
                    {label: layer_statistics(layer, *given, rounds)}))
        with patch.object(encapnet, "standardise", standardise):
            run.net(normalised(first_images(run, images)[0], run.data))
    return found


def em_errors(data_path, seeds):
    """Of the study of routing's capnet-em, 3 iterations, in both forms -> {form: [%, ...]}"""
    errors = {}
    for name, standardise in FORMS.items():
        for seed in range(seeds):
            config = row_config(ROUTING, model_row("capnet-em", iterations=3, factored=False), dict(
                data_path=data_path, seed=seed, device="cpu"))
            with patch.object(encapnet, "standardise", standardise):
                error, _ = errors_after_training(new_run(config))
            errors.setdefault(name, []).append(error)
            say(f"{name}, seed {seed}: test error {error:.2f} %")
    return errors


def em(data_path, rounds=5, images=16, seeds=3):
    """-> figure, found: {"statistics": {layer and form: {what: [one per iteration]}},
                         "errors": {form: [one per seed]}}
    """
    found = {"statistics": em_statistics(data_path, rounds, images),
             "errors": em_errors(data_path, seeds)}
    figure, ((*axes, last),) = canvas(1, 3, width=12, height=3.2)
    for axis, what, of in zip(axes, ("effective votes", "deviation of log p"),
                              ("of a capsule", "over j"), strict=True):
        series = {label: dict(enumerate(zip(seen[what], strict=True), 1))
                  for label, seen in found["statistics"].items()}
        draw_series(axis, series, xlabel="iteration", xticks=range(1, rounds + 1), yscale="log",
                    ylabel=f"{what} {of} (median)")
    axes[0].legend(fontsize=8)
    for place, errors in enumerate(found["errors"].values()):
        last.plot([place] * len(errors), errors, "o", color="black")
    last.set(xlim=(-0.5, 1.5), ylim=(0, None), ylabel="test error after training (%), per seed")
    last.set_xticks(range(len(FORMS)), list(FORMS))
    last.grid(alpha=0.3)
    return figure, found


# ---- The burst -----------------------------------------------------------------------------------

def observed_step(run, images, labels, draws):
    """A training step -> [margin's gradient, weighted divergence's, rate of modules].

    Gradients: their norms over the modules' weights.  rate: how far Adam moves a weight of the
    modules on average, in units of the learning rate; 1 at the first step.
    """
    weights = list(run.net.blocks.parameters())
    loss, feedback, _ = losses(run, images, labels, draws)
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
        run, seen = new_run(config), []
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


# ---- From a ResNet to EncapNet -------------------------------------------------------------------

@torch.no_grad()
def starting_lengths(net, x):
    """Mean length of the capsules of each dimension in a new network -> {d: length}."""
    seen = {}

    def record(layer, inputs, image):
        capsules = image.unflatten(1, (layer.types, -1))                 # (B, G, d, H, W)
        seen.setdefault(capsules.shape[2], []).append(capsules.norm(dim=2).mean().item())
    for layer in capconvs(net.train()):
        layer.register_forward_hook(record)
    net(x)
    return {dim: statistics.mean(lengths) for dim, lengths in seen.items()}


def capconvs(net):
    return [layer for layer in net.modules() if isinstance(layer, encapnet.CapConv)]


# Each of these functions replaces a part of EncapNet by a ResNet's.

def plain_convolutions(net):
    """Every layer one ordinary 3x3 convolution, in place of master, aide and coefficients."""
    for layer in capconvs(net):
        low, high = layer.master.in_channels, layer.master.out_channels
        layer.master = nn.Conv2d(low, high, 3, layer.master.stride, padding=1, bias=False)
        layer.coefficients = layer.aide = None


def no_squash(net):
    net.forward = patch.object(encapnet, "squash_image", lambda s, types: s)(net.forward)


def unscaled(net):
    """BatchNorm's weight from 1, torch's default, instead of 1 / sqrt(d)."""
    for layer in capconvs(net):
        nn.init.ones_(layer.norm.weight)


def fixed_coefficients(net):
    for layer in capconvs(net):
        layer.coefficients = "fixed"
        del layer.from_v1, layer.from_v2


def pooled_classes(net):
    """Average pooling and a linear layer for capFC; scores are logits."""
    net.classes = nn.Linear(net.types * net.classes.weight.shape[0], 10)
    net.scores = lambda u: net.classes(u.mean((2, 3)))


def tenfold_lengths(net):
    """For cross entropy: lengths below 1 as logits would never tell classes apart."""
    lengths = net.scores
    net.scores, net.logits = lambda u: 10 * lengths(u), True


PARTS = {"master and aide, added": plain_convolutions,
         "squash": no_squash,
         "BatchNorm from 1 / sqrt(d)": unscaled,
         "coefficients m1, m2": fixed_coefficients,
         "class capsules (cross entropy)": pooled_classes,
         "margin loss: EncapNet": tenfold_lengths}
NETWORKS = ["ResNet", "EncapNet's layers and skips", *(f"+ {part}" for part in PARTS)]


def use_parts(net, n):
    """Leave an EncapNet the first n of PARTS."""
    for undo in reversed(list(PARTS.values())[n:]):
        undo(net)


def errors_of(network, seed, data_path):
    """Train one of NETWORKS in the setting of Table 3 in small -> errors in %: held-out images, the
    images of the last epoch in training."""
    k = NETWORKS.index(network)
    config = row_config(SMALL, model_row("encapnet" if k > 0 else "resnet18", feedback=0), dict(
        data_path=f"{data_path}/cifar10-jpeg", hold_out=True, augment="+", flip=True, seed=seed,
        loss="ce" if k <= len(PARTS) else "margin", device="cpu", channels_last=True))
    run = new_run(config)
    if k > 0:
        use_parts(run.net, k - 1)
        run.optimizer = make_optimizer(config, run.net.parameters(), run.device)
    return errors_after_training(run)


def steps(data_path, seeds=3):
    """-> figure, found: {"errors": {network: {seed: [held-out, training]}},
                         "lengths": {first weight of BatchNorm: {d: mean length}}}
    """
    found = known("steps") or {"errors": {network: {} for network in NETWORKS}}
    for seed in map(str, range(seeds)):                      # as JSON has it
        for network in NETWORKS:
            errors = found["errors"][network]
            if seed not in errors:
                errors[seed] = errors_of(network, int(seed), data_path)
                say(f"{network}, seed {seed}: error: held-out {errors[seed][0]:.2f} %, "
                    f"training {errors[seed][1]:.2f} %")
                keep("steps", found)
    found["lengths"] = {}
    for name, undo in (("1 / sqrt(d)", lambda net: None), ("1", unscaled)):
        net = encapnet.build("encapnet", image_size=16, types=4)
        undo(net)
        found["lengths"][name] = starting_lengths(net, torch.randn(64, 3, 16, 16))
    return draw_steps(found), found


def draw_steps(found):
    figure, ((left, right),) = canvas(1, 2, width=12, height=3.6)
    for (name, lengths), colour in zip(found["lengths"].items(), COLOURS, strict=False):
        left.plot(list(map(str, lengths)), list(lengths.values()), "o-", color=colour, label=name)
    left.set(xlabel="capsule dimension d", ylabel="mean length, untrained", ylim=(0, 1))
    left.legend(fontsize=8, title="BatchNorm starts at")
    seeds = [list(zip(*errors.values(), strict=True)) for errors in found["errors"].values()]
    for k, images in enumerate(("held-out", "training")):
        middles, halves = zip(*(interval(kinds[k]) for kinds in seeds), strict=True)
        places = [network + (k - 0.5) / 4 for network in range(len(seeds))]
        right.errorbar(middles, places, xerr=halves, fmt="o", capsize=2, color=COLOURS[k],
                       label=f"{images} images")
    right.set_yticks(range(len(seeds)), list(found["errors"]))
    right.invert_yaxis()
    right.set_xlabel("error (%), mean and 95 % interval over seeds")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


# ---- The command ---------------------------------------------------------------------------------

def known(name):
    """What an earlier command has found."""
    path = RUNS / f"why-{name}.json"
    return json.loads(path.read_text())["found"] if path.exists() else {}


def keep(name, found):
    path = RUNS / f"why-{name}.json"
    RUNS.mkdir(exist_ok=True)
    numbers = {"why": name, "found": found, "environment": environment(torch.device("cpu"))}
    write_file(path, json.dumps(numbers).encode())
    return path


def command(words):
    parser = Parser("python -m lab.why", description=__doc__)
    parser.add_argument("name", choices=("em", "burst", "steps"),
                        help="what to measure, as above")
    parser.add_argument("--data-path", default="data", metavar="DIR",
                        help="folder with MNIST, for em, and cifar10-jpeg, for steps "
                        "(default: data)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    measure = {"em": partial(em, given.data_path), "burst": burst,
               "steps": partial(steps, given.data_path)}[given.name]
    figure, found = measure()
    save_figure(figure, RUNS / f"why-{given.name}.png")
    say(f"wrote {keep(given.name, found)}")


main = partial(guarded, "lab.why", command)

if __name__ == "__main__":
    sys.exit(main())
