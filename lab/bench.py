"""Speed and memory: of training, and of its parts beside what a user would pick instead.

    python train.py --bench                 a training step of a model: images/s, its parts, memory
    python train.py --bench routing         routing without votes against routing of votes
    python train.py --bench sinkhorn        the divergence against POT and geomloss
    python train.py --bench network         EncapNet against a straightforward one; cost of feedback
    python train.py --bench scaling         what grows how; draws runs/scaling.png

Everything here is measured forward and backward, on a GPU with the device waited for, on a CPU with
one thread (but for a training step).  There memory, and the time of routing, are those of a process
of its own; divergences and networks are timed in turn in one process, so that drift meets all.
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
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import encapnet
from encapnet import RoutedCapsules, squash
from lab.config import cost_key, make_config
from lab.data import Data, Split
from lab.figures import canvas, save_figure
from lab.fit import build_run, environment, record, start, train_step
from lab.runtime import RUNS, Problem, rank, say, world

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
        say(f"{what}: {1e3 * ours[0]:,.1f} ms"
            + (f"; {name}: {1e3 * seconds:,.1f} ms, {seconds / ours[0]:.2f} x" if seconds else ""))
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


def bench_routing(device, batches=(1, 4, 128), shape=TABLE_1):
    """The layer of Table 1 without votes and with; Sabour's DigitCaps against textbook code."""
    for routing, batch in itertools.product(("dynamic", "em"), batches):
        what = f"{routing} routing, batch {batch}"
        def cost(form, routing=routing, batch=batch):
            return costs([(routing_step, routing, form, 1, TINY),
                          (routing_step, routing, form, batch, shape)], device)[0]
        votes = cost("votes") if batch <= 4 else None                    # or hundreds of GB
        compare(what, cost("factored"), {"votes": votes}, device)
    for batch in (1, 16, 64):
        form = {name: costs([(routing_step, "dynamic", name, 1, TINY | dict(positions=1)),
                             (routing_step, "dynamic", name, batch, DIGITCAPS)], device)[0]
                for name in ("factored", "textbook")}
        compare(f"DigitCaps 1152x8 -> 10x16, batch {batch}", form["factored"],
                {"textbook code": form["textbook"]}, device)


# ------------------------------------------------------------------------------------------------
# Optimal transport
# ------------------------------------------------------------------------------------------------

EPS, ITERATIONS = 0.1, 10
OURS = partial(encapnet.sinkhorn_divergence, eps=EPS, iterations=ITERATIONS)


def cosine_costs(x, y):
    return torch.stack([encapnet.cosine_cost(*pair) for pair in ((x, y), (x, x), (y, y))])


def with_pot(x, y):
    """Eq. (11) by ot.sinkhorn, a problem at a time, plan detached."""
    import ot

    def W(x, y):
        Q = encapnet.cosine_cost(x, y)
        a, b = (torch.full((n,), 1 / n).to(Q) for n in Q.shape)
        plan = ot.sinkhorn(a, b, Q.detach(), EPS, numItermax=ITERATIONS, stopThr=0, warn=False)
        return (Q * plan).sum()
    return 2 * W(x, y) - W(x, x) - W(y, y)


def with_pot_batch(solve, x, y):
    """Eq. (11) by a batch solver of POT, its three problems at once."""
    Q = cosine_costs(x, y)
    marginals = [torch.full(Q.shape[:-1], 1 / n).to(Q) for n in Q.shape[1:]]
    if solve == "projection":
        from ot.batch import bregman_projection_batch
        plan = bregman_projection_batch((-Q.detach() / EPS).exp(), *marginals,
                                        max_iter=ITERATIONS, tol=0)["T"]
    else:
        from ot.batch import solve_batch
        plan = solve_batch(Q.detach(), EPS, *marginals, max_iter=ITERATIONS, tol=0, method=solve,
                           grad="detach").plan
    return encapnet.debias(*(Q * plan).sum((1, 2)))


def with_geomloss(loss, x, y):
    """Eq. (11) plus an entropy, whose gradient with a detached plan is the same."""
    return 2 * loss(x, y)                                                # it halves


def divergences():
    """{name: function (x, y) -> divergence} of what is installed."""
    found = {"ot.sinkhorn": with_pot}
    for solve in ("projection", "sinkhorn", "log_sinkhorn"):
        found[f"POT batch, {solve}"] = partial(with_pot_batch, solve)
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


def plain_squash_image(s, types):
    """squash_image as it is commonly written: capsules permuted to the last axis and back."""
    B, C, H, W = s.shape
    s = s.reshape(B, types, C // types, H, W).permute(0, 1, 3, 4, 2).contiguous()
    length = s.norm(dim=-1, keepdim=True)
    v = length ** 2 / (1 + length ** 2) * s / (length + 1e-8)
    return v.permute(0, 1, 4, 2, 3).contiguous().view(B, C, H, W)


def network_step(form, feedback, batch, model, changes, device):
    """A training step of a network: "plain", "ours" (channels_last) or "compiled" (both)."""
    ours = form != "plain"
    config = make_config(dataset="cifar10", model=model, batch_size=batch, device=str(device),
                         channels_last=ours, compile=form == "compiled",
                         amp=device.type == "cuda",
                         set={**changes, "feedback": feedback})
    run = build_run(config, random_data(config, device), device)
    run.net.train()
    draws = torch.rand(batch, 7, device=device)

    def step():
        before = encapnet.squash_image
        encapnet.squash_image = before if ours else plain_squash_image
        try:
            train_step(run, run.data.train.images, run.data.train.labels, draws)
        finally:
            encapnet.squash_image = before
    return step


class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation reads and writes, views aside."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        written = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if not operation.is_view:
            self.bytes += sum(x.numel() * x.element_size() for x in read + written)
        return result


def ceilings(device):
    """What the device reaches: operations a second (a GPU: in bfloat16), bytes a second."""
    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    x, y = (torch.zeros(2 ** 26, device=device) for _ in range(2))
    return (2 * n ** 3 / timed(lambda: torch.mm(a, b), device),
            2 * x.numel() * x.element_size() / timed(lambda: y.copy_(x), device))


def bench_budget(device, batch, model, changes):
    """Operations and bytes of a training step, beside what the device could do in that time."""
    step = network_step("ours", 0, batch, model, changes, device)
    step()
    with FlopCounterMode(display=False) as operations, Traffic() as traffic:
        step()
    flops, moved, seconds = operations.get_total_flops(), traffic.bytes, timed(step, device)
    top_flops, top_bytes = ceilings(device)
    bound = max(flops / top_flops, moved / top_bytes)
    say(f"{model}, batch {batch}: {flops / 1e9:,.1f} GFLOP and {moved / 1e9:,.2f} GB a step, at "
        f"{top_flops / 1e9:,.0f} GFLOP/s and {top_bytes / 1e9:,.1f} GB/s at least "
        f"{flops / top_flops:,.2f} s and {moved / top_bytes:,.2f} s; takes {seconds:,.2f} s, "
        f"{100 * bound / seconds:.0f} % of the roofline")
    record({"budget": {"model": model, "batch": batch, "flops": flops, "bytes": moved,
                       "seconds": seconds, "flops_a_second": top_flops,
                       "bytes_a_second": top_bytes, **on_one_thread(device)}})


def network_seconds(forms, sizes, device):
    """Seconds of a training step of each (form, units) of a dict, in turn on one CPU thread."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    return timed_in_turn({name: network_step(*form, *sizes, device)
                          for name, form in forms.items()}, device, budget=60.0)


def bench_network(device, batch=None, model="encapnet", changes=None):
    """EncapNet v1 against permuting code in torch's default layout; what feedback units add."""
    batch, changes = batch or (128 if device.type == "cuda" else 16), changes or {}
    sizes, tiny = (batch, model, changes), (2, "encapnet-small", {})
    forms = {"ours": ("ours", 0), "plain code": ("plain", 0), "with 1 unit a module": ("ours", 1),
             "with 2 units a module": ("ours", 2)}
    memory = {name: apart(extra_memory, [(network_step, *form, *tiny),
                                         (network_step, *form, *sizes)], device)[0]
              for name, form in forms.items()}
    seconds = network_seconds({**forms, "compiled": ("compiled", 0)}, sizes, device)
    cost = {name: (seconds[name], memory.get(name)) for name in seconds}
    what = f"{model} without feedback, batch {batch}"
    compare(what, cost["ours"], {name: cost[name] for name in list(forms)[1:]}, device)
    compare(f"{what}, --compile", cost["compiled"], {"plain code": cost["plain code"]}, device)
    bench_budget(device, *sizes)


# ------------------------------------------------------------------------------------------------
# Growth
# ------------------------------------------------------------------------------------------------


def small_routing_step(routing, batch, types, iterations, device):
    shape = dict(types=types, positions=64, in_dim=8, out=64 * types, out_dim=16)
    return routing_step(routing, "factored", batch, shape, device, iterations)


def small_network_step(batch, side, device):
    model = encapnet.build("encapnet-small", image_size=side, stem_stride=1).to(device)
    x = torch.randn(batch, 3, side, side).to(device, memory_format=torch.channels_last)
    target = torch.zeros(batch, dtype=torch.long, device=device)

    def step():
        scores, feedback = model(x)
        (encapnet.margin_loss(scores, target) + feedback).backward()
    return step


SWEEPS = [    # axis, its values, {curve: value -> case}
    ("batch", (2, 4, 8, 16, 32), {
        "dynamic": lambda n: (small_routing_step, "dynamic", n, 8, 3),
        "EM": lambda n: (small_routing_step, "em", n, 8, 3),
        "EncapNet": lambda n: (small_network_step, n, 32)}),
    ("capsules, lower and higher", (128, 256, 512, 1024), {
        "dynamic": lambda n: (small_routing_step, "dynamic", 4, n // 64, 3),
        "EM": lambda n: (small_routing_step, "em", 4, n // 64, 3)}),
    ("routing iterations", (1, 2, 4, 8), {
        "dynamic": lambda n: (small_routing_step, "dynamic", 4, 8, n),
        "EM": lambda n: (small_routing_step, "em", 4, 8, n)}),
    ("side of the image", (16, 32, 64, 128), {
        "EncapNet": lambda n: (small_network_step, 8, n)}),
    ("samples of a divergence", (256, 512, 1024, 2048), {
        "Sinkhorn": lambda n: (divergence_step, OURS, n, 16)}),
]
STYLES = {"dynamic": ("#0072B2", "o"), "EM": ("#D55E00", "s"), "EncapNet": ("#009E73", "^"),
          "Sinkhorn": ("#CC79A7", "D")}


def exponent(x, y):
    """Slope of a straight line through log y against log x."""
    x, y = (torch.tensor(z, dtype=torch.float64).log() for z in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def bench_scaling(device, sweeps=SWEEPS):
    """Time and memory against batch, capsules, iterations, image side, samples; a figure."""
    lines = []
    for axis, values, curves in sweeps:
        for name, case in curves.items():
            rows = costs([case(values[0]), *map(case, values)], device)
            for y, unit in zip(zip(*rows, strict=True), ("seconds", "bytes"), strict=True):
                if min(y) > 0:
                    lines.append({"of": name, "what": unit, "against": axis, "values": values,
                                  "measured": y, "exponent": exponent(values, y)})
                    say(f"{name}, {unit} against {axis}: n^{lines[-1]['exponent']:.2f}")
                    record({"scaling": {**lines[-1], **on_one_thread(device)}})
    draw_scaling(lines, RUNS / "scaling.png")


def draw_scaling(lines, path):
    """A column an axis, time above memory, both logarithmic."""
    sweeps = list(dict.fromkeys(line["against"] for line in lines))
    figure, axes = canvas(2, len(sweeps), 2.7 * len(sweeps), 2.7)
    for line in lines:
        row, column = line["what"] == "bytes", sweeps.index(line["against"])
        axis, (colour, marker) = axes[int(row)][column], STYLES[line["of"]]
        axis.plot(line["values"], [y / (1e6 if row else 1) for y in line["measured"]],
                  marker=marker, color=colour, label=f"{line['of']}  n^{line['exponent']:.2f}")
        axis.set(xscale="log", yscale="log", xlabel=line["against"])
        axis.set_xticks(line["values"], map(str, line["values"]))
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=9)
    for row, label in zip(axes, ("seconds", "MB beside what lives"), strict=True):
        row[0].set_ylabel(label)
    save_figure(figure, path)


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
