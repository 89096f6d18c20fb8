"""Speed and memory of a training step's parts, beside what a user would pick instead.

    python -m lab.bench routing      routing without votes against routing of votes
    python -m lab.bench sinkhorn     the divergence against POT and geomloss
    python -m lab.bench network      EncapNet: what --compile saves, what feedback adds
    python -m lab.bench scaling      what grows how; draws runs/scaling.png

and of a whole step: python train.py --bench [--model M ...].  All is measured forward and backward,
on a GPU with the device waited for, on a CPU with one thread (but for a training step).  There
routing and growth are measured in processes of their own; divergences and networks are timed in
turn in one process, so that drift meets all.
"""
import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

import encapnet
from encapnet import RoutedCapsules, squash
from lab.config import Parser, make_config
from lab.data import Data, Split
from lab.figures import draw_scaling
from lab.fit import build_run, environment, record, start, train_step
from lab.runtime import RUNS, Problem, guarded, rank, say, world

# ------------------------------------------------------------------------------------------------
# Seconds and bytes
# ------------------------------------------------------------------------------------------------

CLEAR_REFS = Path("/proc/self/clear_refs")                              # of Linux


def peak_memory(device):
    """Bytes: of the device's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def once(step, device):
    """Seconds of one call, the device waited for."""
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def timed_in_turn(steps, device, budget=10.0):
    """Median seconds of each step of a dict after a first call, in turn: noise meets all alike."""
    rounds = []
    while len(rounds) < 2 or sum(map(sum, rounds[1:])) < budget:
        rounds.append([once(step, device) for step in steps.values()])
    return dict(zip(steps, map(statistics.median, zip(*rounds[1:], strict=True)), strict=True))


def timed(step, device, budget=10.0):
    return timed_in_turn({"step": step}, device, budget)["step"]


def extra_memory(step, device):
    """Bytes that one call needs at its peak beside what lives already; on a CPU, Linux counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    CLEAR_REFS.write_text("5")                                           # forget the peak so far
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def costs_here(what, cases, device):
    """[what(step)] of cases (maker, its arguments ...), smallest first: it also warms up."""
    torch.set_num_threads(1)
    results = []
    for maker, *arguments in (cases[0], *cases):
        torch.manual_seed(0)
        results.append(what(maker(*arguments, device), device))
    return results[1:]


def in_a_process(function, *arguments):
    """function(*arguments) in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def costs(cases, device):
    """[(seconds, bytes)] of cases, smallest first; on a CPU measured in processes of their own."""
    if device.type == "cuda":
        return list(zip(*(costs_here(what, cases, device) for what in (timed, extra_memory)),
                        strict=True))
    seconds = in_a_process(costs_here, timed, cases, device)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"         # or glibc keeps arrays that were freed
    try:
        return list(zip(seconds, in_a_process(costs_here, extra_memory, cases, device),
                        strict=True))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def compare(what, costs, device):
    """Print and record.   costs: {name: (seconds, bytes or None), or None: not run}, ours first"""
    (_, ours), *peers = costs.items()
    where = environment(device)
    for name, theirs in peers:
        seconds, memory = theirs or (None, None)
        line = {"what": what, "instead": name, "ours_seconds": ours[0], "seconds": seconds,
                "ours_MB": ours[1] and ours[1] / 1e6, "MB": memory and memory / 1e6,
                **{k: where[k] for k in ("device", "commit", "torch", "command")}}
        say(f"{what}: {1e3 * ours[0]:,.1f} ms; {name}: "
            + (f"{1e3 * seconds:,.1f} ms, ratio {seconds / ours[0]:.2f}" if theirs else "not run"))
        record({"speed": line})


def compare_seconds(what, seconds, device):
    compare(what, {name: (each, None) for name, each in seconds.items()}, device)


# ------------------------------------------------------------------------------------------------
# A training step
# ------------------------------------------------------------------------------------------------


def random_data(config, device):
    """A batch of random images of ten classes in place of a data set."""
    g, side = torch.Generator().manual_seed(0), config.image_size
    batch = config.batch_size // world()
    images = torch.randint(256, (batch, 3, side, side), generator=g, dtype=torch.uint8).to(device)
    split = Split(images, torch.randint(10, (batch,), generator=g).to(device))
    half = torch.full((3,), 0.5, device=device)
    return Data("random", [str(k) for k in range(10)], split, split, side, half, half / 2)


def training_step(config, device):
    """An update of a new network on random images, its first behind it -> function, network."""
    run = build_run(config, random_data(config, device), device)
    run.net.train()
    split, draws = run.data.train, torch.rand(len(run.data.train), 7, device=device)
    step = partial(train_step, run, split.images, split.labels, draws)
    step()
    return step, run.net


def bench_step(config, seconds=3.0):
    """Throughput on random images, where a step's time goes, and peak memory; recorded."""
    device = start(config)
    before, parts, last = peak_memory(device), {}, [0.0]

    def tick(part):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            parts.setdefault(f"{part}_seconds", []).append(now - last[0])
        last[0] = now

    step, net = training_step(config, device)
    whole = timed(step, device, seconds)
    timed(lambda: (tick(None), step(tick=tick)), device, seconds)
    memory = (peak_memory(device) - before) / 1e6
    line = {**cost_key(config), "batch": config.batch_size,
            "parameters": sum(p.numel() for p in net.parameters()), "train_step_seconds": whole,
            "images_per_second": config.batch_size / whole, "memory_MB": memory,
            "device": environment(device)["device"],
            **{part: statistics.median(times) for part, times in parts.items()}}
    line["step_seconds"] = line["forward_seconds"] + line["backward_seconds"]
    split = ", ".join(f"{part.split('_')[0]} {1e3 * line[part]:.1f}" for part in parts)
    say(f"{config.model}, batch {config.batch_size}, {config.image_size}x{config.image_size}, "
        f"{line['device']}: {line['images_per_second']:,.1f} images/s, step {1e3 * whole:.1f} ms "
        f"({split}), peak memory {memory:,.0f} MB, {line['parameters']:,} parameters")
    if rank() == 0:
        record({"bench": line})


def cost_key(config):
    """What decides the memory and time of a step, beside batch and device."""
    return {name: getattr(config, name) for name in (
        "model", "set", "image_size", "amp", "compile", "channels_last")}


def costs_of(config, lines):
    """Those of bench_step's lines that have these settings, with any batch and device."""
    return [line for line in lines if cost_key(config).items() <= line.items()]


FORMS = {"without feedback": (0, False), "--compile": (0, True),       # units, compiled
         "1 unit a module": (1, False), "2 units a module": (2, False)}


def network_step(model, changes, batch, side, compiled, device):
    """A training step of a network, channels-last."""
    return training_step(make_config(
        dataset="cifar10", model=model, set=changes, image_size=side, batch_size=batch,
        device=str(device), channels_last=True, compile=compiled, amp=device.type == "cuda"),
        device)[0]


def network_seconds(device, batch, changes=None):
    """{form: seconds of a training step of EncapNet v1}, in turn."""
    return timed_in_turn(
        {name: network_step("encapnet", {**(changes or {}), "feedback": units}, batch, 32,
                            compiled, device) for name, (units, compiled) in FORMS.items()},
        device, budget=60.0)


def bench_network(device, batch=None, changes=None):
    """EncapNet v1: eager against --compile, and what feedback units add."""
    batch = batch or (128 if device.type == "cuda" else 16)
    compare_seconds(f"encapnet, batch {batch}, without feedback",
                    network_seconds(device, batch, changes), device)


# ------------------------------------------------------------------------------------------------
# Routing
# ------------------------------------------------------------------------------------------------

TABLE_1 = dict(types=32, positions=64, in_dim=8, out=2048, out_dim=16, iterations=3)
DIGITCAPS = dict(types=1152, positions=1, in_dim=8, out=10, out_dim=16, iterations=3)  # Sabour's


LAYERS = [    # what, routing, shape, {form: batches}; votes of 128 samples take hundreds of GB
    ("dynamic routing", "dynamic", TABLE_1, {"factored": (1, 4, 128), "votes": (1, 4)}),
    ("em routing", "em", TABLE_1, {"factored": (1, 4, 128), "votes": (1, 4)}),
    ("DigitCaps 1152x8 -> 10x16", "dynamic", DIGITCAPS,
     {"factored": (1, 16, 64), "textbook code": (1, 16, 64)})]


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
    layer.weight.grad, W.grad = torch.zeros_like(layer.weight), torch.zeros_like(W)

    def step():
        if form == "textbook code":
            v = textbook_routing(u[:, :, 0], W, iterations)
        else:
            v = layer(u, a)[0] if routing == "em" else layer(u)
        (v * g).sum().backward()
    return step


def bench_routing(device, layers=LAYERS):
    """The layer of Table 1 without votes and with; Sabour's DigitCaps against textbook code."""
    for what, routing, shape, forms in layers:
        found = {form: costs([(routing_step, routing, form, n, shape) for n in batches], device)
                 for form, batches in forms.items()}
        for batch, *each in itertools.zip_longest(forms["factored"], *found.values()):
            compare(f"{what}, batch {batch}", dict(zip(found, each, strict=True)), device)


# ------------------------------------------------------------------------------------------------
# Optimal transport
# ------------------------------------------------------------------------------------------------

EPS, ITERATIONS = 0.1, 10
OURS = partial(encapnet.sinkhorn_divergence, eps=EPS, iterations=ITERATIONS)


def with_pot(x, y):
    """Eq. (11) by ot.sinkhorn, a problem at a time, plan detached."""
    import ot

    def W(x, y):
        Q = encapnet.cosine_cost(x, y)
        a, b = (torch.full((n,), 1 / n).to(Q) for n in Q.shape)
        plan = ot.sinkhorn(a, b, Q.detach(), EPS, numItermax=ITERATIONS, stopThr=0, warn=False)
        return (Q * plan).sum()
    return 2 * W(x, y) - W(x, x) - W(y, y)


def with_pot_batch(x, y):
    """Eq. (11) by the fastest of POT's batch solvers, its three problems at once."""
    from ot.batch import bregman_projection_batch
    Q = torch.stack([encapnet.cosine_cost(*pair) for pair in ((x, y), (x, x), (y, y))])
    marginals = [torch.full(Q.shape[:-1], 1 / n).to(Q) for n in Q.shape[1:]]
    plan = bregman_projection_batch((-Q.detach() / EPS).exp(), *marginals,
                                    max_iter=ITERATIONS, tol=0)["T"]
    return encapnet.debias(*(Q * plan).sum((1, 2)))


def divergences():
    """{name: function (x, y) -> divergence} of what is installed."""
    found = {"ot.sinkhorn": with_pot, "POT batch, projection": with_pot_batch}
    try:
        from geomloss import SamplesLoss
        loss = SamplesLoss("sinkhorn", p=1, blur=EPS, diameter=2, backend="tensorized",
                           cost=encapnet.cosine_cost)
        # half of Eq. (11) plus an entropy, whose gradient with a detached plan is the same
        found["geomloss"] = lambda x, y: 2 * loss(x, y)
    except ImportError:
        say("geomloss is not installed (pip install geomloss): left out")
    return found


def one_by_one(divergence, x, y):
    return torch.stack(list(map(divergence, x, y)))


def divergence_step(divergence, batch, dim, device, problems=1):
    """Forward and backward of Eq. (11) between two batches of features, `problems` times."""
    x, y = (torch.randn(problems, batch, dim).to(device).requires_grad_() for _ in range(2))
    return lambda: divergence(x, y).sum().backward()


def sinkhorn_seconds(peers, device, batch=128, dim=16, problems=1):
    """Seconds of "ours" and of every peer (x, y) -> divergences, in turn."""
    torch.manual_seed(0)
    return timed_in_turn({name: divergence_step(function, batch, dim, device, problems)
                          for name, function in {"ours": OURS, **peers}.items()}, device)


def bench_sinkhorn(device, batch=128, dim=16, units=8):
    """One divergence against POT and geomloss; those of all units of a step against a loop."""
    peers = {name: partial(one_by_one, function) for name, function in divergences().items()}
    for what, problems, named in (
            (f"divergence of two {batch}x{dim} batches", 1, peers),
            (f"divergences of {units} units", units, {"one by one": partial(one_by_one, OURS)})):
        compare_seconds(what, sinkhorn_seconds(named, device, batch, dim, problems), device)


# ------------------------------------------------------------------------------------------------
# Growth
# ------------------------------------------------------------------------------------------------


def capsules_case(routing, batch=4, capsules=512, iterations=3):
    """Routing of `capsules` lower ones, 64 of a type, to as many higher ones."""
    return routing_step, routing, "factored", batch, dict(
        types=capsules // 64, positions=64, in_dim=8, out=capsules, out_dim=16,
        iterations=iterations)


def network_case(batch=8, side=32):
    return network_step, "encapnet-small", dict(stem_stride=1), batch, side, False


def divergence_case(samples):
    return divergence_step, OURS, samples, 16


ROUTINGS = {"dynamic": partial(capsules_case, "dynamic"), "EM": partial(capsules_case, "em")}
SWEEPS = [    # axis, keyword of the cases, its values, {curve: case}
    ("batch", "batch", (2, 4, 8, 16, 32), {**ROUTINGS, "EncapNet": network_case}),
    ("capsules, lower and higher", "capsules", (128, 256, 512, 1024), ROUTINGS),
    ("routing iterations", "iterations", (1, 2, 4, 8), ROUTINGS),
    ("side of the image", "side", (16, 32, 64, 128), {"EncapNet": network_case}),
    ("samples of a divergence", "samples", (256, 512, 1024, 2048), {"Sinkhorn": divergence_case}),
]


def exponent(x, y):
    """Slope of a straight line through log y against log x."""
    return statistics.linear_regression(*(list(map(math.log, z)) for z in (x, y))).slope


def bench_scaling(device, sweeps=SWEEPS):
    """Time and memory against batch, capsules, iterations, side, samples; a figure."""
    lines = []
    for axis, keyword, values, curves in sweeps:
        for name, case in curves.items():
            found = costs([case(**{keyword: n}) for n in values], device)
            for unit, y in zip(("seconds", "bytes"), zip(*found, strict=True), strict=True):
                if min(y) > 0:
                    lines.append({"of": name, "what": unit, "against": axis, "values": values,
                                  "measured": y, "exponent": exponent(values, y)})
                    say(f"{name}, {unit} against {axis}: n^{lines[-1]['exponent']:.2f}")
                    record({"scaling": {**lines[-1], **environment(device)}})
    draw_scaling(lines, RUNS / "scaling.png")


BENCHES = {"routing": bench_routing, "sinkhorn": bench_sinkhorn, "network": bench_network,
           "scaling": bench_scaling}


def run_bench(name, config):
    """--bench NAME."""
    if name == "step":
        return bench_step(config)
    device, threads = start(config), torch.get_num_threads()
    if device.type != "cuda" and not (device.type == "cpu" and CLEAR_REFS.exists()):
        raise Problem(f"--bench {name} needs a GPU, or the account that Linux gives of a process")
    torch.set_num_threads(1)
    try:
        BENCHES[name](device)
    finally:
        torch.set_num_threads(threads)


def command(words):
    parser = Parser("python -m lab.bench", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHES, help="what to measure, as above")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(words)
    run_bench(given.name, make_config(device=given.device))


def main(arguments=None):
    """-> exit code"""
    return guarded("lab.bench", command, arguments)


if __name__ == "__main__":
    sys.exit(main())
