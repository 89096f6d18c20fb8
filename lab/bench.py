"""Speed and memory: of a training step, and of its parts beside what a user would pick instead.

    python train.py --bench [--model M ...]    a training step: images/s, its parts, memory
    python -m lab.bench routing                routing without votes against routing of votes
    python -m lab.bench sinkhorn               the divergence against POT and geomloss
    python -m lab.bench network                EncapNet: what --compile saves, what feedback adds
    python -m lab.bench scaling                what grows how; draws runs/scaling.png

Everything is measured forward and backward, on a GPU with the device waited for, on a CPU with one
thread (but for a training step).  There memory, and the time of routing, are those of a process of
its own; divergences and networks are timed in turn in one process, so that drift meets all.
"""
import itertools
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
from lab.config import Parser, cost_key, make_config
from lab.data import Data, Split
from lab.figures import draw_scaling
from lab.fit import build_run, environment, record, start, train_step
from lab.runtime import RUNS, Problem, guarded, rank, say, world

# ------------------------------------------------------------------------------------------------
# A training step
# ------------------------------------------------------------------------------------------------


def peak_memory(device):
    """Bytes: of the device's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def random_data(config, device):
    """A batch of random images of ten classes in place of a data set."""
    g, side = torch.Generator().manual_seed(0), config.image_size
    batch = config.batch_size // world()
    images = torch.randint(256, (batch, 3, side, side), generator=g, dtype=torch.uint8).to(device)
    split = Split(images, torch.randint(10, (batch,), generator=g).to(device))
    half = torch.full((3,), 0.5, device=device)
    return Data("random", [str(k) for k in range(10)], split, split, side, half, half / 2)


def timed_steps(run, tick, seconds):
    """Train for at least this long and three steps -> seconds a step, the device waited for."""
    split = run.data.train
    draws = torch.rand(len(split), 7, device=run.device)
    begun = time.perf_counter()
    for n in itertools.count(1):
        tick(None)
        train_step(run, split.images, split.labels, draws, tick)
        if n >= 3 and time.perf_counter() - begun > seconds:
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - begun) / n


def bench_step(config, seconds=3.0):
    """Throughput on random images, where a step's time goes, and peak memory; recorded."""
    device = start(config)
    data, before, parts, last = random_data(config, device), peak_memory(device), {}, [0.0]
    run = build_run(config, data, device)
    run.net.train()

    def tick(part):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part:
            parts.setdefault(f"{part}_seconds", []).append(now - last[0])
        last[0] = now

    timed_steps(run, lambda part: None, 0)                # warm up
    step = timed_steps(run, lambda part: None, seconds)
    timed_steps(run, tick, seconds)
    memory = (peak_memory(device) - before) / 1e6
    line = {**cost_key(config), "batch": config.batch_size,
            "parameters": sum(p.numel() for p in run.net.parameters()), "train_step_seconds": step,
            "images_per_second": config.batch_size / step, "memory_MB": memory,
            "device": environment(device)["device"],
            **{part: statistics.median(times) for part, times in parts.items()}}
    line["step_seconds"] = line["forward_seconds"] + line["backward_seconds"]
    split = ", ".join(f"{part.split('_')[0]} {1e3 * line[part]:.1f}" for part in parts)
    say(f"{config.model}, batch {config.batch_size}, {config.image_size}x{config.image_size}, "
        f"{line['device']}: {line['images_per_second']:,.1f} images/s, step {1e3 * step:.1f} ms "
        f"({split}), peak memory {memory:,.0f} MB, {line['parameters']:,} parameters")
    if rank() == 0:
        record({"bench": line})


# ------------------------------------------------------------------------------------------------
# Seconds and bytes of a function: a maker builds it, a process of its own runs it
# ------------------------------------------------------------------------------------------------


CLEAR_REFS = Path("/proc/self/clear_refs")                              # of Linux


def once(step, device):
    """Seconds of one call, the device waited for."""
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def timed(step, device, budget=2.0):
    """Median seconds of step() over `budget` or three calls, after a first, or of that if long."""
    first, times = once(step, device), []
    while first < 60 and (len(times) < (3 if first < 10 else 1) or sum(times) < budget):
        times.append(once(step, device))
    return statistics.median(times or [first])


def timed_in_turn(steps, device, budget=10.0):
    """Median seconds of each short step of a dict, called in turn: noise meets all alike."""
    def round_of_calls():
        return [once(step, device) for step in steps.values()]

    round_of_calls()
    rounds = [round_of_calls()]
    while sum(map(sum, rounds)) < budget:
        rounds.append(round_of_calls())
    return dict(zip(steps, map(statistics.median, zip(*rounds, strict=True)), strict=True))


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
    """[what(step)] of cases (maker, its arguments ...), the smallest first as a warm-up."""
    device = torch.device(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    results = []
    for maker, *arguments in cases:
        torch.manual_seed(0)
        results.append(what(maker(*arguments, device), device))
    return results


def apart(what, cases, device):
    """[what(step)] of cases but the first, a warm-up; on a CPU in a process of their own."""
    if device.type == "cuda":
        return costs_here(what, cases, device)[1:]
    # by default glibc keeps small arrays that were freed, between others that live
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    if what is extra_memory:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = pool.submit(costs_here, what, cases, str(device)).result()
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    return results[1:]


def costs(cases, device):
    """[(seconds, bytes)] of cases in growing order but the first, a warm-up."""
    return list(zip(apart(timed, cases, device), apart(extra_memory, cases, device), strict=True))


def on_one_thread(device):
    """The environment of what costs_here measured."""
    return {**environment(device), **({"device": "CPU, 1 thread"} if device.type == "cpu" else {})}


def compare(what, ours, peers, device):
    """Print and record.   ours: (seconds, bytes or None);  peers: {name: the same or None}"""
    where = on_one_thread(device)
    for name, theirs in peers.items():
        seconds, memory = theirs or (None, None)
        line = {"what": what, "instead": name, "ours_seconds": ours[0], "seconds": seconds,
                "ours_MB": ours[1] and ours[1] / 1e6, "MB": memory and memory / 1e6,
                **{name: where[name] for name in ("device", "commit", "torch", "command")}}
        say(f"{what}: {1e3 * ours[0]:,.1f} ms; {name}: "
            + (f"{1e3 * seconds:,.1f} ms, ratio {seconds / ours[0]:.2f}" if theirs else "not run"))
        if rank() == 0:
            record({"speed": line})


# ------------------------------------------------------------------------------------------------
# Routing
# ------------------------------------------------------------------------------------------------

TABLE_1 = dict(types=32, positions=64, in_dim=8, out=2048, out_dim=16)         # of 2,048 x 2,048
DIGITCAPS = dict(types=1152, positions=1, in_dim=8, out=10, out_dim=16)        # Sabour et al. 2017
TINY = dict(types=2, positions=16, in_dim=8, out=16, out_dim=16)               # warm-up


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


def routing_step(routing, form, batch, shape, device, iterations=3):
    """Forward and backward of a routed layer.   form: "factored", "votes", "textbook" """
    types, positions, in_dim, out, out_dim = shape.values()
    layer = RoutedCapsules(types, in_dim, out, out_dim, routing, iterations,
                           softmax="out" if positions == 1 else "in",
                           factored=form == "factored").to(device)
    u = torch.randn(batch, types, positions, in_dim).relu().to(device).requires_grad_()
    a = torch.rand(batch, types * positions).to(device)
    g = torch.randn(batch, out, out_dim).to(device)
    W = layer.weight.detach().permute(0, 2, 3, 1).contiguous().requires_grad_()
    layer.weight.grad, W.grad = torch.zeros_like(layer.weight), torch.zeros_like(W)

    def step():
        if form == "textbook":
            v = textbook_routing(u[:, :, 0], W, iterations)
        else:
            v = layer(u, a)[0] if routing == "em" else layer(u)
        (v * g).sum().backward()
    return step


def routing_cost(routing, form, batch, shape, device):
    """(seconds, bytes) of that."""
    warm_up = (routing_step, routing, form, 1, {**TINY, "positions": min(16, shape["positions"])})
    return costs([warm_up, (routing_step, routing, form, batch, shape)], device)[0]


def bench_routing(device, batches=(1, 4, 128), shape=TABLE_1):
    """The layer of Table 1 without votes and with; Sabour's DigitCaps against textbook code."""
    for routing, batch in itertools.product(("dynamic", "em"), batches):
        votes = batch <= 4 and routing_cost(routing, "votes", batch, shape, device)   # else 100s GB
        compare(f"{routing} routing, batch {batch}",
                routing_cost(routing, "factored", batch, shape, device), {"votes": votes}, device)
    for batch in (1, 16, 64):
        ours, textbook = (routing_cost("dynamic", form, batch, DIGITCAPS, device)
                          for form in ("factored", "textbook"))
        compare(f"DigitCaps 1152x8 -> 10x16, batch {batch}", ours, {"textbook code": textbook},
                device)


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


def with_geomloss(loss, x, y):
    """Eq. (11) plus an entropy, whose gradient with a detached plan is the same."""
    return 2 * loss(x, y)                                                # it halves


def divergences():
    """{name: function (x, y) -> divergence} of what is installed."""
    found = {"ot.sinkhorn": with_pot, "POT batch, projection": with_pot_batch}
    try:
        from geomloss import SamplesLoss
        loss = SamplesLoss("sinkhorn", p=1, blur=EPS, diameter=2, backend="tensorized",
                           cost=encapnet.cosine_cost)
        found["geomloss"] = partial(with_geomloss, loss)
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
    """Seconds of "ours" and of every peer (x, y) -> divergences, in turn on one thread."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    return timed_in_turn({name: divergence_step(function, batch, dim, device, problems)
                          for name, function in {"ours": OURS, **peers}.items()}, device)


def bench_sinkhorn(device, batch=128, dim=16, units=8):
    """One divergence against POT and geomloss; those of all units of a step against a loop."""
    peers = {name: partial(one_by_one, function) for name, function in divergences().items()}
    for what, problems, named in (
            (f"divergence of two {batch}x{dim} batches", 1, peers),
            (f"divergences of {units} units", units, {"one by one": partial(one_by_one, OURS)})):
        seconds = sinkhorn_seconds(named, device, batch, dim, problems)
        compare(what, (seconds.pop("ours"), None),
                {name: (each, None) for name, each in seconds.items()}, device)


# ------------------------------------------------------------------------------------------------
# EncapNet
# ------------------------------------------------------------------------------------------------


def network_step(changes, compiled, batch, model, device):
    """A training step of a network, channels-last, on random images."""
    config = make_config(dataset="cifar10", model=model, batch_size=batch, device=str(device),
                         channels_last=True, compile=compiled, amp=device.type == "cuda",
                         set=changes)
    run = build_run(config, random_data(config, device), device)
    run.net.train()
    draws = torch.rand(batch, 7, device=device)
    return lambda: train_step(run, run.data.train.images, run.data.train.labels, draws)


FORMS = {"without feedback": (0, False), "--compile": (0, True),       # units, compiled
         "1 unit a module": (1, False), "2 units a module": (2, False)}


def network_seconds(device, batch, model="encapnet", changes=None):
    """{form: seconds of a training step}, in turn on one CPU thread."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    return timed_in_turn(
        {name: network_step({**(changes or {}), "feedback": units}, compiled, batch, model, device)
         for name, (units, compiled) in FORMS.items()}, device, budget=60.0)


def bench_network(device, batch=None, model="encapnet", changes=None):
    """EncapNet v1: eager against --compile, and what feedback units add."""
    batch = batch or (128 if device.type == "cuda" else 16)
    seconds = network_seconds(device, batch, model, changes)
    compare(f"{model}, batch {batch}, without feedback", (seconds.pop("without feedback"), None),
            {name: (each, None) for name, each in seconds.items()}, device)


# ------------------------------------------------------------------------------------------------
# Growth
# ------------------------------------------------------------------------------------------------


def capsules_step(routing, batch, types, iterations, device):
    shape = dict(types=types, positions=64, in_dim=8, out=64 * types, out_dim=16)
    return routing_step(routing, "factored", batch, shape, device, iterations)


SWEEPS = [    # axis, its values, maker, {curve: value -> arguments of the maker}
    ("batch", (2, 4, 8, 16, 32), capsules_step, {
        "dynamic": lambda n: ("dynamic", n, 8, 3), "EM": lambda n: ("em", n, 8, 3)}),
    ("capsules, lower and higher", (128, 256, 512, 1024), capsules_step, {
        "dynamic": lambda n: ("dynamic", 4, n // 64, 3), "EM": lambda n: ("em", 4, n // 64, 3)}),
    ("routing iterations", (1, 2, 4, 8), capsules_step, {
        "dynamic": lambda n: ("dynamic", 4, 8, n), "EM": lambda n: ("em", 4, 8, n)}),
    ("samples of a divergence", (256, 512, 1024, 2048), divergence_step, {
        "Sinkhorn": lambda n: (OURS, n, 16)}),
]


def exponent(x, y):
    """Slope of a straight line through log y against log x."""
    return statistics.linear_regression(*(torch.tensor(z, dtype=torch.float64).log().tolist()
                                          for z in (x, y))).slope


def bench_scaling(device, sweeps=SWEEPS):
    """Time and memory against batch, capsules, iterations, samples; a figure."""
    lines = []
    for (axis, values, maker, curves), unit in itertools.product(sweeps, ("seconds", "bytes")):
        for name, arguments in curves.items():
            cases = [(maker, *arguments(n)) for n in (values[0], *values)]
            y = apart(timed if unit == "seconds" else extra_memory, cases, device)
            if min(y) > 0:
                lines.append({"of": name, "what": unit, "against": axis, "values": values,
                              "measured": y, "exponent": exponent(values, y)})
                say(f"{name}, {unit} against {axis}: n^{lines[-1]['exponent']:.2f}")
                record({"scaling": {**lines[-1], **on_one_thread(device)}})
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
    try:
        BENCHES[name](device)
    finally:
        torch.set_num_threads(threads)


def command(words):
    parser = Parser("lab.bench", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(words)
    run_bench(given.name, make_config(device=given.device))


def main(arguments=None):
    """-> exit code"""
    return guarded("lab.bench", command, arguments)


if __name__ == "__main__":
    sys.exit(main())
