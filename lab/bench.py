"""Speed and memory of routing and of the divergence, beside what a user would pick instead.

    python -m lab.bench routing      routing without votes against routing of votes
    python -m lab.bench sinkhorn     the divergence against POT and geomloss

Both forward and backward, on a CPU with one thread; bytes are those that torch's allocator counts.
python train.py --bench [--model M ...] measures a whole training step.
"""
import itertools
import math
import os
import sys
from functools import partial

import torch

import encapnet
from encapnet import RoutedCapsules, squash
from lab.config import Parser, make_config
from lab.data import Data, Split
from lab.fit import build_run, losses, start, train_step
from lab.results import as_json, environment, record
from lab.runtime import guarded, say, world

os.environ.setdefault("KINETO_LOG_LEVEL", "99")     # the profiler's own lines on stderr

# ---- Seconds and bytes ---------------------------------------------------------------------------

def median_seconds(step, budget=10.0):
    """Median seconds of a call, after a first one; calls go on for at least `budget` seconds."""
    from torch.utils.benchmark import Timer  # slow to import
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=budget).median


def peak_memory(function, device):
    """What a call needs at its peak beside what lives already -> its result, bytes.

    nan on devices other than CPU and CUDA, which keep no such account
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return function(), torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return function(), math.nan
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = function()
    changes = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return result, max(itertools.accumulate(changes), default=0)


def compare(what, steps, device):
    """Measure, print and record.   steps: {name: step, or None: not run}, ours first"""
    found = {name: (median_seconds(step), peak_memory(step, device)[1] / 1e6)  # beside gradients
             for name, step in steps.items() if step}
    ours, our_memory = next(iter(found.values()))
    for name in list(steps)[1:]:
        seconds, memory = found.get(name, (None, None))
        say(f"{what}: {1e3 * ours:,.1f} ms; {name}: "
            + (f"{1e3 * seconds:,.1f} ms, ratio {seconds / ours:.2f}" if seconds else "not run"))
        record({"speed": {"what": what, "instead": name, "ours_seconds": ours, "seconds": seconds,
                          "ours_MB": our_memory, "MB": memory, **environment(device)}})


# ---- A training step -----------------------------------------------------------------------------

def random_data(config, device):
    """A batch of random images of ten classes in place of a data set."""
    g, side = torch.Generator().manual_seed(0), config.image_size
    shape = config.batch_size // world(), 3, side, side
    images = torch.randint(256, shape, generator=g, dtype=torch.uint8).to(device)
    split = Split(images, torch.randint(10, shape[:1], generator=g).to(device))
    half = torch.full((3,), 0.5, device=device)
    return Data("random", list("0123456789"), split, split, side, half, half / 2)


COST = ("model", "set", "image_size", "amp", "compile", "channels_last", "batch_size")


def costs_of(config, lines):
    """Those of bench_step's lines that have these settings, on any device."""
    return [line for line in lines if as_json(config, COST).items() <= line.items()
            and "forward_backward_seconds" in line]                      # older lines have others


def bench_step(config, seconds=3.0):
    """Throughput on random images, seconds and peak memory of a step; recorded."""
    device = start(config)

    def begin():
        run = build_run(config, random_data(config, device), device)
        run.net.train()
        images, labels = run.data.train.images, run.data.train.labels
        batch = images, labels, torch.rand(len(labels), 7, device=device)
        for _ in range(2):                                # Adam has its moments after the first
            train_step(run, *batch)
        return run, batch
    (run, batch), peak = peak_memory(begin, device)

    def forward_backward():
        run.optimizer.zero_grad(set_to_none=True)
        loss, feedback, _ = losses(run, *batch)
        (loss + config.lam * feedback).backward()
    whole, part = (median_seconds(step, seconds)
                   for step in (partial(train_step, run, *batch), forward_backward))
    line = {**as_json(config, COST), "device": environment(device)["device"],
            "parameters": sum(p.numel() for p in run.net.parameters()), "step_seconds": whole,
            "forward_backward_seconds": part, "memory_MB": peak / 1e6}
    say(f"{config.model}, {line['parameters']:,} parameters, batch {config.batch_size}, "
        f"{config.image_size}x{config.image_size}, {line['device']}: "
        f"{config.batch_size / whole:,.1f} images/s, step {1e3 * whole:.1f} ms, of it forward and "
        f"backward {1e3 * part:.1f} ms, peak memory of its tensors {peak / 1e6:,.0f} MB")
    record({"bench": line})


# ---- Routing -------------------------------------------------------------------------------------

TABLE_1 = dict(types=32, positions=64, in_dim=8, out=2048, out_dim=16, iterations=3)
DIGITCAPS = dict(types=1152, positions=1, in_dim=8, out=10, out_dim=16, iterations=3)  # Sabour's

LAYERS = [    # what, routing, shape, the other form, batches
    ("dynamic routing", "dynamic", TABLE_1, "votes", (1, 4, 128)),
    ("em routing", "em", TABLE_1, "votes", (1, 4, 128)),
    ("DigitCaps 1152x8 -> 10x16", "dynamic", DIGITCAPS, "textbook code", (1, 16, 64))]


def textbook_routing(u, W, iterations=3):
    """Dynamic routing as it is commonly written: broadcast products, then sums.

    u: (B, i, c);  W: (i, j, d, c) -> v (B, j, d)
    """
    votes = (W[None] @ u[:, :, None, :, None]).squeeze(-1)               # (B, i, j, d)
    b = votes.new_zeros(votes.shape[:3])
    for r in range(iterations):
        v = squash((b.softmax(2)[..., None] * votes).sum(1))
        if r < iterations - 1:
            b = b + (votes * v[:, None]).sum(-1)
    return v


def routing_step(routing, form, batch, shape, device):
    """Forward and backward of a routed layer.   form: "factored", "votes", "textbook code" """
    types, positions, in_dim, out, out_dim, iterations = shape.values()
    layer = RoutedCapsules(types, in_dim, out, out_dim, routing, iterations,
                           softmax="out" if positions == 1 else "in",
                           factored=form == "factored").to(device)
    u = torch.randn(batch, types, positions, in_dim).relu().to(device).requires_grad_()
    a = torch.rand(batch, types * positions).to(device)
    g = torch.randn(batch, out, out_dim).to(device)
    W = layer.weight.detach().permute(0, 2, 3, 1).contiguous().requires_grad_()

    def step():
        if form == "textbook code":
            v = textbook_routing(u[:, :, 0], W, iterations)
        else:
            v = layer(u, a)[0] if routing == "em" else layer(u)
        (v * g).sum().backward()
    return step


def bench_routing(device, layers=LAYERS):
    """The layer of Table 1 without votes and with; Sabour's DigitCaps against textbook code."""
    for what, routing, shape, other, batches in layers:
        for n in batches:
            step = partial(routing_step, routing, batch=n, shape=shape, device=device)
            both = n < 128                                # votes of 128 would take hundreds of GB
            compare(f"{what}, batch {n}", {"ours": step(form="factored"),
                                           other: step(form=other) if both else None}, device)


# ---- Optimal transport ---------------------------------------------------------------------------

EPS, ITERATIONS = 0.1, 10
OURS = partial(encapnet.sinkhorn_divergence, eps=EPS, iterations=ITERATIONS)


def with_pot(x, y):
    """Eq. (11) by ot.sinkhorn, a problem at a time, plan detached."""
    import ot

    def W(x, y):
        Q = encapnet.cosine_cost(x, y)
        plan = ot.sinkhorn([], [], Q.detach(), EPS, numItermax=ITERATIONS, stopThr=0, warn=False)
        return (Q * plan).sum()
    return 2 * W(x, y) - W(x, x) - W(y, y)


def with_pot_batch(x, y):
    """Eq. (11) by the fastest of POT's batch solvers, its three problems at once."""
    from ot.batch import bregman_projection_batch
    Q = torch.stack([encapnet.cosine_cost(*pair) for pair in ((x, y), (x, x), (y, y))])
    marginals = [torch.full(Q.shape[:-1], 1 / n).to(Q) for n in Q.shape[1:]]
    plan = bregman_projection_batch((-Q.detach() / EPS).exp(), *marginals,
                                    max_iter=ITERATIONS, tol=0)["T"]
    xy, xx, yy = (Q * plan).sum((1, 2))
    return 2 * xy - xx - yy


def divergences():
    """{name: function (x, y) -> divergence} of what is installed, ours first."""
    found = {"ours": OURS, "ot.sinkhorn": with_pot, "POT batch, projection": with_pot_batch}
    try:
        from geomloss import SamplesLoss
        loss = SamplesLoss("sinkhorn", p=1, blur=EPS, diameter=2, backend="tensorized",
                           cost=encapnet.cosine_cost)
        # half of Eq. (11) plus an entropy, whose gradient with a detached plan is the same
        found["geomloss"] = lambda x, y: 2 * loss(x, y)
    except ImportError:
        say("geomloss is not installed (pip install geomloss): left out")
    return found


def divergence_step(divergence, batch, dim, device):
    """Forward and backward of Eq. (11) between two batches of features (batch, dim)."""
    x, y = (torch.randn(batch, dim).to(device).requires_grad_() for _ in range(2))
    return lambda: divergence(x, y).backward()


def bench_sinkhorn(device, batch=128, dim=16):
    """One divergence against POT and geomloss."""
    steps = {name: divergence_step(function, batch, dim, device)
             for name, function in divergences().items()}
    compare(f"divergence of two {batch}x{dim} batches", steps, device)


BENCHES = {"routing": bench_routing, "sinkhorn": bench_sinkhorn}


def command(words):
    parser = Parser("python -m lab.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES, help="what to measure, as above")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    device = start(make_config(device=given.device))
    torch.set_num_threads(1)
    BENCHES[given.name](device)


main = partial(guarded, "lab.bench", command)

if __name__ == "__main__":
    sys.exit(main())
