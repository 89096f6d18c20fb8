"""Why two things failed: measurements behind two figures of README.

    python -m lab.why em       routing by EM, log densities standardised over j or left as they are
    python -m lab.why burst    the first steps with the feedback unit at the paper's weight
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch

import encapnet
from lab.config import Parser, make_config, number
from lab.data import load_data, normalised, shuffle, views
from lab.figures import COLOURS, canvas, save_figure
from lab.fit import build_run, classification_loss, environment, learning_rate, start
from lab.measure import call
from lab.runtime import RUNS, guarded, say, write_file

FORMS = {"log p standardised": "both", "log p as it is": "cost"}    # of EM routing

# ------------------------------------------------------------------------------------------------
# EM routing
# ------------------------------------------------------------------------------------------------


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


@torch.no_grad()
def layer_statistics(layer, u, activation, normalise, rounds):
    """Medians of both after 1 .. rounds iterations of one layer -> {name: [a number a round]}."""
    votes, seen = layer.votes(u), {"effective votes": [], "deviation of log p": []}
    for r in range(1, rounds + 1):
        mu, _, R = encapnet.em_routing(votes, activation, layer.beta_v, layer.beta_a, r,
                                       return_coefficients=True, normalise=normalise)
        for values, found in zip(seen.values(), routing_statistics(votes, activation, mu, R),
                                 strict=True):
            values.append(found.median().item())
    return seen


def em(data_path, rounds=5, images=16):
    """Both layers of an untrained capnet-em (4 types) on MNIST, in both forms."""
    config = make_config(dataset="mnist", data_path=data_path, model="capnet-em",
                         set=dict(types=4), train_images=images, test_images=images, device="cpu")
    device = start(config)
    data, found = load_data(config, device), {}
    x = normalised(next(views(data.test.images, data.side, False, False)), data)
    for name, form in FORMS.items():
        changed = dataclasses.replace(config, set={**config.set, "normalise": form})
        net, given = build_run(changed, data, device).net.train(), []
        for layer in net.routed:
            layer.register_forward_hook(lambda layer, u, out, given=given: given.append(u))
        with torch.no_grad():
            net(x)
        for k, layer in enumerate(net.routed):
            found[f"layer {k + 1}, {name}"] = layer_statistics(layer, *given[k], form, rounds)
    figure, axes = canvas(1, 2, height=3.2)
    for axis, what in zip(axes[0], ("effective votes", "deviation of log p"), strict=True):
        for k, (label, seen) in enumerate(found.items()):
            axis.plot(range(1, rounds + 1), seen[what], "o-" if k < 2 else "s--",
                      color=COLOURS[k % 2], label=label)
        axis.set(xlabel="iteration", xticks=range(1, rounds + 1), yscale="log",
                 ylabel=f"{what}{' of a capsule' if axis is axes[0, 0] else ' over j'} (median)")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure, found


# ------------------------------------------------------------------------------------------------
# The burst
# ------------------------------------------------------------------------------------------------


def observed_step(run, x, labels):
    """One update, its parts apart -> [margin's gradient, weighted divergence's, rate of modules].

    Gradients: their norms over the modules' weights.  rate: how far Adam moves a weight of the
    modules on average, in units of the learning rate; 1 at the first step.
    """
    config, weights = run.config, list(run.net.blocks.parameters())
    scores, feedback = call(run.model, config, x)
    loss = classification_loss(config, scores, labels, run.progress)
    parts = [torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True)
             for part in (loss, config.lam * feedback)]
    run.optimizer.zero_grad(set_to_none=True)
    (loss + config.lam * feedback).backward()
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), config.clip or math.inf)
    lr = learning_rate(config, run.progress)
    run.optimizer.param_groups[0]["lr"] = lr
    before = torch.cat([w.detach().flatten() for w in weights])
    run.optimizer.step()
    moved = torch.cat([w.detach().flatten() for w in weights]) - before
    norms = [torch.nn.utils.get_total_norm([g for g in part if g is not None]) for part in parts]
    return [*map(float, norms), float(moved.abs().mean() / lr)]


def burst(data_path, steps=400):
    """The default run at lambda = 10, without clipping and with: its first steps."""
    found = {}
    for name, clip in (("not clipped", 0.0), ("clipped to 1", 1.0)):
        config = make_config(lam=10.0, clip=clip, train_images=min(16000, 64 * steps),
                             data_path=data_path, device="cpu")
        device = start(config)
        run = build_run(config, load_data(config, device), device)
        run.net.train()
        seen = []
        while len(seen) < steps:
            order, _ = shuffle(len(run.data.train), config.seed, run.epoch)
            chunks = order[:run.steps * run.batch].split(run.batch)[:steps - len(seen)]
            for images, labels, _ in run.data.train.batches(chunks, device):
                seen.append(observed_step(run, normalised(images / 255, run.data), labels))
                run.step += 1
            run.epoch, run.step = run.epoch + 1, 0
        found[name] = dict(zip(("margin loss", "lambda x divergence", "rate"),
                               map(list, zip(*seen, strict=True)), strict=True))
    figure, axes = canvas(1, 2, height=3.2)
    left, right = axes[0]
    for name, style in (("not clipped", "-"), ("clipped to 1", "--")):
        for k, what in enumerate(("margin loss", "lambda x divergence")):
            left.plot(found[name][what], style, color=COLOURS[k], lw=1, label=f"{what}, {name}")
        right.plot(found[name]["rate"], style, color=COLOURS[2], lw=1, label=name)
    left.set(xlabel="step", ylabel="gradient of the modules (norm)", yscale="log")
    right.set(xlabel="step", ylabel="mean move of a weight / learning rate", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure, found


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def command(words):
    parser = Parser("python -m lab.why", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("em", "burst"),
                        help="routing by EM, with and without standardised log densities; or the "
                             "first steps of training with the feedback unit, lambda = 10")
    parser.add_argument("--steps", type=number(1), default=400, metavar="N",
                        help="of training, for burst (default: 400)")
    parser.add_argument("--data-path", default="data", metavar="DIR",
                        help="folder with MNIST, for em (default: data)")
    parser.add_argument("--output-dir", type=Path, default=RUNS, metavar="DIR",
                        help="where to write why-NAME.png and why-NAME.json (default: runs)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    figure, found = em(given.data_path) if given.name == "em" else burst(given.data_path,
                                                                         given.steps)
    path = given.output_dir / f"why-{given.name}.png"
    save_figure(figure, path)
    numbers = {"why": given.name, "found": found, "environment": environment(torch.device("cpu"))}
    write_file(path.with_suffix(".json"), json.dumps(numbers).encode())
    say(f"wrote {path.with_suffix('.json')}")


def main(arguments=None):
    """-> exit code"""
    return guarded("lab.why", command, arguments)


if __name__ == "__main__":
    sys.exit(main())
