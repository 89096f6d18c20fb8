"""One training run: a step, an epoch, an evaluation, fit; and the use of a trained network."""
import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import encapnet
from lab.checkpoint import (
    average_totals,
    caught_signals,
    check_finite,
    check_free,
    due,
    load_checkpoint,
    locked,
    newest,
    numbered_folder,
    plain_names,
    restore,
    run_folder,
    save,
    write_log,
)
from lab.config import DATASETS, PEERS, Config, config_key, identity_fields, merge
from lab.data import SUFFIXES, Data, augmented, decode, grey, load_data, normalised, shuffle, views
from lab.figures import draw_run
from lab.runtime import (
    RUNS,
    Problem,
    agreed,
    join_processes,
    pick_device,
    rank,
    reason,
    restarts,
    say,
    shared,
    world,
    write_file,
)

# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


class Peer(nn.Module):
    """A torchvision network with our interface: (logits, no feedback)."""

    logits = True

    def __init__(self, name, num_classes, **keywords):
        super().__init__()
        import torchvision
        self.net = getattr(torchvision.models, name)(num_classes=num_classes, **keywords)

    def forward(self, x):
        logits = self.net(x)
        return logits, logits.new_zeros(())


def make_model(config, classes, channels):
    try:
        if config.model in PEERS:
            return Peer(config.model, classes, **{**PEERS[config.model], **config.set})
        return encapnet.build(config.model, classes, channels, config.image_size, **config.set)
    except (ValueError, TypeError) as error:
        raise Problem(f"model {config.model}: {error}") from error


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.forward(ctx, gradient)


class AllReduceBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes; SyncBatchNorm does not run on a CPU."""

    def forward(self, x):
        if not self.training or world() == 1:
            return super().forward(x)
        n = world() * x[:, 0].numel()
        mean = SumOverProcesses.apply(x.sum((0, 2, 3))) / n                          # (C,)
        centred = x - mean.view(-1, 1, 1)
        var = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / max(1, n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def synchronised(net, device):
    """The network with BatchNorm over all processes; names of weights stay."""
    if world() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if world() > 1 and type(module) is nn.BatchNorm2d:
            module.__class__ = AllReduceBatchNorm
    return net


def wrapped(net, config, device):
    """What is called in training: net, distributed and compiled as asked."""
    model = net
    if world() > 1:
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)
    return torch.compile(model) if config.compile else model


# ------------------------------------------------------------------------------------------------
# One step, one epoch, evaluation
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """Everything about a training run; what a checkpoint holds is below the line."""

    config: Config
    data: Data
    device: torch.device
    net: nn.Module                 # the network
    model: nn.Module               # the network as called in training: distributed, compiled
    optimizer: torch.optim.Optimizer
    header: dict                   # first line of the log
    folder: Path = None
    signals: list = ()             # caught, to act on after the step
    saved: float = 0.0             # when
    # --------------------------------------------------------------------------------------------
    epoch: int = 0                 # completed
    step: int = 0                  # completed in this epoch
    totals: Tensor = None          # sums over steps: 1, then what train_step gives
    history: list = dataclasses.field(default_factory=list)     # an entry an epoch
    seconds: float = 0.0           # spent on it so far
    moments: list = dataclasses.field(default_factory=list)     # Figure 2's, of routed networks

    @property
    def batch(self):
        n = min(self.config.batch_size, len(self.data.train))
        return n - n % world()

    @property
    def steps(self):
        """Steps of an epoch; the few images left over are others in the next one."""
        return len(self.data.train) // self.batch

    @property
    def progress(self):
        return (self.epoch + self.step / self.steps) / max(1, self.config.epochs)


def learning_rate(config, progress):
    """Of a step at this part in [0, 1) of the run."""
    if config.schedule == "steps":
        epochs = progress * config.epochs + 1e-9          # done; a milestone may lie within one
        return config.lr * config.gamma ** sum(epochs >= m for m in config.milestones)
    rise = 0.2                                            # one cycle: up a line, down a cosine
    if progress < rise:
        return config.lr * (0.04 + 0.96 * progress / rise)
    return config.lr * max(1e-3, 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise)))


def make_optimizer(config, parameters, device):
    fused = {"fused": True} if device.type in ("cuda", "cpu") else {}
    return {
        "adam": lambda p, **kw: torch.optim.Adam(p, betas=(0.9, 0.999), **fused, **kw),
        "rmsprop": torch.optim.RMSprop,
        "sgd": lambda p, **kw: torch.optim.SGD(p, momentum=0.9, **fused, **kw),
    }[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)


def classification_loss(config, scores, labels, progress):
    """margin, spread (m annealed 0.2 -> 0.9, or fixed) or cross entropy, mean over the batch."""
    if config.loss == "ce":
        return F.cross_entropy(scores, labels)
    if config.loss == "margin":
        return encapnet.margin_loss(scores, labels)
    margin = 0.9 if config.loss == "spread-fixed" else 0.2 + 0.7 * progress
    return encapnet.spread_loss(scores, labels, margin)


def call(model, config, x):
    """The model under the Config's precision and memory format."""
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp):
        scores, feedback = model(x)
    return scores.float(), feedback.float()


def train_step(run, images, labels, draws, tick=lambda part: None):
    """One update -> (5,): loss, feedback divergence, share of wrong answers in this batch, norm of
    the gradient before clipping, 1 if it was clipped; on the device, nothing is waited for.

    tick("data"), then "forward", "backward", "optimizer": called after each part, for --bench
    """
    config = run.config
    x = normalised(augmented(images, draws, run.data.side, config.augment, config.flip), run.data)
    tick("data")
    scores, feedback = call(run.model, config, x)
    loss = classification_loss(config, scores, labels, run.progress)
    tick("forward")
    run.optimizer.zero_grad(set_to_none=True)
    (loss + config.lam * feedback).backward()
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), config.clip or math.inf)
    tick("backward")
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.progress)
    run.optimizer.step()
    tick("optimizer")
    wrong = (scores.detach().argmax(1) != labels).float().mean()
    clipped = (norm > (config.clip or math.inf)).float()
    return torch.stack([loss.detach(), feedback.detach(), wrong, norm, clipped])


def train_epoch(run, bar):
    """From where the run stands to the end of the epoch; saves now and then, stops on a signal."""
    config, split = run.config, run.data.train
    order, draws = (t.to(run.device) for t in shuffle(len(split), config.seed, run.epoch))
    chunks = [order[k * run.batch:(k + 1) * run.batch][rank()::world()] for k in range(run.steps)]
    bad = torch.full((2,), -1, device=run.device)         # first step with a bad loss, feedback
    run.net.train()
    for images, labels, index in split.batches(chunks[run.step:], run.device, config.workers):
        values = train_step(run, images, labels, draws[index])
        run.step += 1
        bad = torch.where((bad < 0) & ~values[:2].isfinite(), run.step, bad)
        run.totals[0] += 1
        run.totals[1:] += values
        if run.step % config.print_freq == 0 or run.step == run.steps:
            check_finite(run, bad)
            bar.show(run)
        caught = agreed(run.signals[0] if run.signals else int(due(run)))
        if caught:
            save(run, bad)
        if caught > 1:
            raise Problem(f"stopped by {signal.Signals(caught).name} in epoch {run.epoch + 1}, "
                          f"after step {run.step}"
                          f"; go on with: python train.py --resume {run.folder}", 128 + caught)


@torch.no_grad()
def count_hits(run, multi_crop=False):
    """Of the whole test set, each image counted once however many the processes.

    -> (3,): right first answers, right among the first five, images; on the device
    """
    data, mirror = run.data, DATASETS[run.config.dataset].flips
    mine = torch.arange(rank(), len(data.test), world(), device=run.device)
    hits = torch.zeros(3, dtype=torch.long, device=run.device)           # top-1, top-5, images
    run.net.eval()
    chunks = mine.split(run.config.batch_size)
    for images, labels, _ in data.test.batches(chunks, run.device, run.config.workers):
        scores = [call(run.net, run.config, normalised(x, data))[0]
                  for x in views(images, data.side, multi_crop, mirror)]
        scores = sum(s.softmax(1) if run.net.logits else s for s in scores)
        right = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum(), torch.ones_like(labels).sum()])
    if world() > 1:
        dist.all_reduce(hits)
    return hits


def evaluate(run, multi_crop=False):
    """Errors in % -> {"error": top-1, "top5_error":, "images": their number}"""
    top1, top5, n = count_hits(run, multi_crop).tolist()
    return {"error": 100 * (n - top1) / n, "top5_error": 100 * (n - top5) / n, "images": n}


@torch.no_grad()
def agreement(net, x, labels, bins=20):
    """Cosine of the true class's capsule v_j and its votes, in the last routed layer.   [Fig. 2]

    -> {"percent": of the votes in each of `bins` bins over [-1, 1], "length": their mean length}
    """
    seen = []
    hook = net.routed[-1].register_forward_hook(
        lambda layer, given, out: seen.append((given[0], out)))
    net.eval()(x)
    hook.remove()
    u, v = seen[0][0], seen[0][1] if isinstance(seen[0][1], Tensor) else seen[0][1][0]
    b = torch.arange(len(x), device=x.device)
    votes = net.routed[-1].votes(u)[b, :, labels]                        # (B, i, d)
    cosine = F.cosine_similarity(                         # a fresh v is shorter than 1e-8
        votes, v[b, labels].unsqueeze(1), dim=-1, eps=1e-30)             # (B, i)
    place = ((cosine + 1) / 2 * bins).long().clamp(0, bins - 1).flatten().cpu()
    count = torch.bincount(place, minlength=bins).double()
    length = torch.bincount(place, votes.norm(dim=-1).flatten().double().cpu(), minlength=bins)
    return {"percent": (100 * count / count.sum()).tolist(),
            "length": (length / count.clamp(min=1)).tolist()}


class Bar:
    """Progress: a tqdm bar an epoch on a terminal, otherwise one plain line an epoch."""

    def __init__(self, run):
        self.bar, self.since, self.first = None, time.time(), run.step
        if rank() == 0 and sys.stdout.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=run.steps, initial=run.step, leave=False, file=sys.stdout,
                            desc=f"epoch {run.epoch + 1}/{run.config.epochs}")

    def show(self, run):
        if self.bar is not None:
            n, loss, feedback, wrong, *_ = run.totals.tolist()
            self.bar.set_postfix_str(f"loss {loss / n:.4f}, feedback {feedback / n:.4f}, "
                                     f"error {100 * wrong / n:.1f} %")
            self.bar.update(run.step - self.bar.n)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def clock(seconds):
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}h{rest // 60:02}m" if hours else f"{rest // 60}m{rest % 60:02}s"


# ------------------------------------------------------------------------------------------------
# fit: a Config in, a result out
# ------------------------------------------------------------------------------------------------


def start(config):
    """Device and process group of a run -> device."""
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        tf32 = not config.deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():         # torchrun started us
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if config.batch_size % world():
        raise Problem(f"--batch-size {config.batch_size} does not divide among {world()} processes")
    return device


def environment(device):
    """What a result depends on besides its Config."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                         capture_output=True, text=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type.upper()}, {torch.get_num_threads()} threads"
    return {"device": name, "processes": world(), "torch": str(torch.__version__),
            "python": platform.python_version(),
            "commit": git.stdout.strip() or None,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])}


def build_run(config, data, device):
    """A network with all that its training needs, before the first step."""
    torch.manual_seed(config.seed)
    net = make_model(config, len(data.classes), data.channels).to(device)
    if config.channels_last and device.type == "cpu" and any(
            isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)
            and m.in_channels < 8 for m in net.modules()):
        say("--channels-last: off, torch 2.15 crashes in this network's narrow strided 1x1 "
            "convolutions on a CPU")
        config = dataclasses.replace(config, channels_last=False)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)
    net = synchronised(net, device)
    optimizer = make_optimizer(config, net.parameters(), device)
    double = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.zeros(6, dtype=double, device=device)
    header = {"config": dataclasses.asdict(config), "environment": environment(device)}
    return Run(config, data, device, net, wrapped(net, config, device), optimizer, header,
               totals=totals)


def begin(run):
    """Bring a run to its start, or to where its checkpoint left it."""
    if run.config.resume:
        restore(run, load_checkpoint(run.config.resume, mend=True))
        if rank() == 0 and run.epoch < run.config.epochs:
            (run.folder / "result.json").unlink(missing_ok=True)
        say(f"{run.folder}: going on after epoch {run.epoch}, step {run.step}")
    else:
        look_at_routing(run)
        save(run)
    run.saved = time.time()
    write_log(run)


def look_at_routing(run):
    """Record the agreement of votes before training, after 10 %, 40 % and all of it.   [Fig. 2]"""
    moments = {math.ceil(part * run.config.epochs) for part in (0, 0.1, 0.4, 1)}
    if hasattr(run.net, "routed") and run.epoch in moments:
        index = torch.arange(min(64, len(run.data.test)), device=run.device)
        images, labels, _ = next(run.data.test.batches([index], run.device))
        x = normalised(next(views(images, run.data.side, False, False)), run.data)
        run.moments.append({"epoch": run.epoch, **agreement(run.net, x, labels)})


def introduce(run):
    data, config = run.data, run.config
    weights = sum(p.numel() for p in run.net.parameters())
    say(f"{data.name}: {len(data.train):,} + {len(data.test):,} images, {len(data.classes)} "
        f"classes; {config.model}: {weights:,} parameters; {config.epochs} epochs, "
        f"recipe {config.recipe}, on {environment(run.device)['device']}; {run.folder}")


@torch.no_grad()
def told_apart(run, n=200):
    """[FeedbackUnit.told_apart of every unit] on the first n test images, in eval."""
    if not getattr(run.net, "feedback", 0):
        return []
    index = torch.arange(min(n, len(run.data.test)), device=run.device)
    images, *_ = next(run.data.test.batches([index], run.device))
    x = normalised(next(views(images, run.data.side, False, False)), run.data)
    _, pairs = run.net.eval().walk(run.net.stem(x))
    return [unit.told_apart(low).item()
            for unit, (low, _) in zip(run.net.units, pairs, strict=True)]


def finish_epoch(run, since, images):
    """Test, log, print."""
    average_totals(run)
    n, *sums = run.totals.tolist()
    loss, feedback, wrong, norm, clipped = (total / n for total in sums)
    test = evaluate(run)
    lr = run.optimizer.param_groups[0]["lr"]
    run.seconds += time.time() - since
    run.epoch, run.step = run.epoch + 1, 0
    run.totals.zero_()
    entry = {"epoch": run.epoch, "lr": lr, "loss": loss, "feedback": feedback,
             "gradient_norm": norm, "clipped_percent": 100 * clipped,
             "train_error": 100 * wrong, "test_error": test["error"],
             "test_top5_error": test["top5_error"], "told_apart": told_apart(run),
             "time": {"seconds": run.seconds, "images_per_second": images}}
    run.history.append(entry)
    look_at_routing(run)
    left = run.seconds / run.epoch * (run.config.epochs - run.epoch)
    gradient = f"gradient {norm:.2g}" + f", {100 * clipped:.0f} % clipped" * (run.config.clip > 0)
    say(f"epoch {run.epoch:3}/{run.config.epochs}  loss {loss:.4f}  feedback {feedback:.4f}  "
        f"{gradient}  error: train {100 * wrong:5.2f} %  test {test['error']:5.2f} %  "
        f"{images:,.0f} images/s  {clock(left)} left")
    if agreed(int(run.epoch == run.config.epochs or due(run))):
        save(run)
    write_log(run)


@torch.no_grad()
def sample(run, n):
    """n test images in [0, 1], spread over all of them, the network's answers, the labels."""
    index = torch.linspace(0, len(run.data.test) - 1, min(n, len(run.data.test)),
                           device=run.device).long()
    images, labels, _ = next(run.data.test.batches([index], run.device))
    x = next(views(images, run.data.side, False, False))
    run.net.eval()
    answers = call(run.net, run.config, normalised(x, run.data))[0].argmax(1)
    return x.cpu(), answers.tolist(), labels.tolist()


def finish(run):
    """The result of a finished run, recorded in its folder and in runs/results.jsonl."""
    config, last = run.config, (run.history or [{}])[-1]
    multi_crop = config.augment != "none"
    test = evaluate(run, multi_crop)
    chance = 100 * (1 - 1 / len(run.data.classes))
    best = min(run.history, key=lambda e: e["test_error"], default={})
    result = {
        "data": run.data.name, "model": config.model, "recipe": config.recipe, "seed": config.seed,
        "epochs": config.epochs, "key": config_key(config), "outcome": "ok", **test,
        "multi_crop": multi_crop,
        **{name: last.get(name) for name in ("train_error", "loss", "feedback")},
        "best_by_test_error": {k: best.get(k) for k in ("epoch", "test_error")},
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "seconds": round(run.seconds, 1),
        "folder": str(run.folder), "config": run.header["config"] | {"epochs": config.epochs},
        "environment": run.header["environment"],
        "curves": {k: [e[k] for e in run.history]
                   for k in ("loss", "feedback", "train_error", "test_error")},
        "moments": run.moments, "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if last and last["train_error"] > 0.95 * chance:
        result["outcome"] = "at chance"
    if rank() == 0:
        draw_run(run.history, *sample(run, 24), run.data.classes, run.folder / "curves.png")
        record(result)
        write_file(run.folder / "result.json", json.dumps(result, indent=1).encode())
    return result


def record(result):
    """One line to runs/results.jsonl, after a line that a kill left torn if there is one."""
    RUNS.mkdir(exist_ok=True)
    file = RUNS / "results.jsonl"
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with open(file, "a") as lines:
        lines.write("\n" * torn + json.dumps(result) + "\n")


def fit(config):
    """Train as the Config says, from the start or from config.resume -> the result, plain types."""
    device = start(config)
    if restarts() and not config.resume:
        before = newest(identity_fields(config)) if not config.output_dir else \
            config.output_dir if Path(config.output_dir, "last.pt").exists() else None
        config = dataclasses.replace(config, resume=shared(before and str(before)))
    if config.output_dir and not config.resume and rank() == 0:
        check_free(Path(config.output_dir))
    run = build_run(config, load_data(config, device), device)
    folder = config.resume or config.output_dir or shared(
        str(numbered_folder(config)) if rank() == 0 else None)
    run.folder = folder = run_folder(folder)
    with locked(folder), caught_signals() as run.signals:
        begin(run)
        if config.resume and (folder / "result.json").exists():
            say(f"{folder} is already finished")
            return json.loads((folder / "result.json").read_text())
        introduce(run)
        while run.epoch < config.epochs:
            since, first, bar = time.time(), run.step, Bar(run)
            try:
                train_epoch(run, bar)
            finally:
                bar.close()
            speed = (run.steps - first) * run.batch / max(1e-9, time.time() - since)
            finish_epoch(run, since, speed)
        return finish(run)


# ------------------------------------------------------------------------------------------------
# Use a trained network
# ------------------------------------------------------------------------------------------------


def trained(given):
    """The run of --resume, for looking at -> config, checkpoint, network in eval mode, device."""
    state = load_checkpoint(given["resume"])
    config = Config(**merge(state["config"], given))
    device = start(config)
    channels = len(state["data"]["mean"])
    net = make_model(config, len(state["data"]["classes"]), channels)
    try:
        net.load_state_dict(plain_names(state["net"]))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise Problem(f"{given['resume']} does not fit {config.model} ({reason(error)})") from error
    return config, state, net.to(device).eval(), device


def test_only(given):
    """Test error of a trained network, on its own data or, with --data-path, on other like it."""
    config, state, net, device = trained(given)
    data = load_data(config, device)
    if data.classes != state["data"]["classes"]:
        raise Problem(f"{data.name} has other classes than the data the network was trained on")
    data = dataclasses.replace(data, mean=state["data"]["mean"].to(device),
                               std=state["data"]["std"].to(device))
    run = Run(config, data, device, net, net, None, {})
    test = evaluate(run, config.augment != "none")
    top5 = f"top-5 {test['top5_error']:.2f} %, " * (len(data.classes) > 5)
    say(f"{data.name}, {config.model} after epoch {state['epoch']}: test error "
        f"{test['error']:.2f} %, {top5}{test['images']:,} images")


def load(run, **given):
    """A trained network, to use in another program -> net in eval mode, class names, transform.

    run: its folder or checkpoint;  given: fields of Config to change, such as device="cuda"
    transform(image file, its path or open) -> (1, C, H, W), as the network was trained on
    """
    config, state, net, device = trained({"resume": str(run), **given})
    mean, std = (state["data"][name].view(-1, 1, 1) for name in ("mean", "std"))

    def transform(file):
        x = decode(file, config.image_size)[None] / 255
        return (((grey(x) if len(mean) == 1 else x) - mean) / std).to(device)
    return net, state["data"]["classes"], transform


@torch.no_grad()
def predict(paths, given):
    """A line an image, or an image of a folder: its classes, the longest (likeliest) first."""
    net, classes, transform = load(given.pop("resume"), **given)
    files = [file for path in map(Path, paths) for file in (sorted(
        f for f in path.iterdir() if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path])]
    bad = 0
    for file in files:
        try:
            scores = net(transform(file))[0][0]
        except Exception as error:                                       # PIL raises all kinds
            print(f"{file}: cannot read it ({reason(error)})")
            bad += 1
            continue
        values, order = (scores.softmax(0) if net.logits else scores).sort(descending=True)
        print(f"{file}:", ", ".join(f"{classes[k]} {value:.3f}" for k, value in zip(
            order[:10].tolist(), values.tolist(), strict=False)))
    if bad or not files:
        raise Problem(f"{bad} of {len(files)} images cannot be read: {', '.join(paths)[:200]}", 1)
