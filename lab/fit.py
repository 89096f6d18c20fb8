"""One training run: the network, a step, an epoch, an evaluation, fit."""
import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import encapnet
from lab import checkpoint, measure
from lab.config import PEERS, Config, tested_on, with_epochs
from lab.data import Data, augmented, load_data, normalised, shuffle
from lab.figures import draw_run
from lab.results import environment, record
from lab.runtime import Problem, count, rank, say, start, world, write_file

# ---- The network ---------------------------------------------------------------------------------

def make_model(config, classes, channels):
    try:
        if config.model in PEERS:
            import torchvision
            net = getattr(torchvision.models, config.model)(
                num_classes=classes, **{**PEERS[config.model], **config.set})
            net.logits = True                             # our interface: (logits, no feedback)
            net.register_forward_hook(lambda net, given, out: (out, out.new_zeros(())))
            return net
        return encapnet.build(config.model, classes, channels, config.image_size, **config.set)
    except (ValueError, TypeError) as error:
        raise Problem(f"model {config.model}: {error}") from error


def class_layer(config, classes, channels):
    """Names of the weights whose shape follows the number of classes."""
    with torch.device("meta"):
        few, more = (make_model(config, n, channels).state_dict() for n in (classes, classes + 1))
    return [name for name in few if few[name].shape != more[name].shape]


def start_from(run, path):
    """The weights of --init RUN; where the classes are others, the class layer keeps its own."""
    state = checkpoint.load_checkpoint(path)
    same = state["data"]["classes"] == run.data.classes
    keep = () if same else class_layer(run.config, len(run.data.classes), len(run.data.mean))
    checkpoint.load_weights(run.net, state, f"--init {path}", keep)
    say(f"weights of {path}, after {count(state['epoch'], 'epoch')}"
        + ("" if same else "; its classes are others: the class layer starts anew"))


# ---- One step, one epoch, evaluation -------------------------------------------------------------

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
    signals: list = ()             # caught so far; acted on after the step
    saved: float = 0.0             # time of the last checkpoint
    # --------------------------------------------------------------------------------------------
    epoch: int = 0                 # completed
    step: int = 0                  # completed in this epoch
    totals: Tensor = None          # sums over steps: 1, then what train_step gives
    history: list = dataclasses.field(default_factory=list)     # one entry per epoch
    seconds: float = 0.0           # of training, up to the last checkpoint
    moments: list = dataclasses.field(default_factory=list)     # agreement of votes, for Figure 2

    @property
    def batch(self):
        return batch_size(self.config, len(self.data.train))

    @property
    def steps(self):
        """Steps of an epoch; a few images are left over, other ones each time."""
        return len(self.data.train) // self.batch

    @property
    def progress(self):
        return (self.epoch + self.step / self.steps) / max(1, self.config.epochs)


def batch_size(config, images):
    """Images of a step; with --fit-batch at most a twentieth of all: an epoch has 20 steps."""
    n = min(config.batch_size, max(2, images // 20) if config.fit_batch else images)
    return max(world(), n - n % world())


def learning_rate(config, progress):
    """The rate of a step, given the finished share of the run, in [0, 1)."""
    if config.schedule == "steps":
        epochs = progress * config.epochs + 1e-9          # done; a milestone may lie within one
        return config.lr * config.gamma ** sum(epochs >= m for m in config.milestones)
    rise = 0.2                                            # one cycle: up a line, down a cosine
    if progress < rise:
        return config.lr * (0.04 + 0.96 * progress / rise)
    return config.lr * max(1e-3, 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise)))


def make_optimizer(config, parameters, device):
    options = dict(lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, **options)
    if device.type in ("cuda", "cpu"):
        options["fused"] = True
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return torch.optim.Adam(parameters, **options)


def classification_loss(config, scores, labels, progress):
    """margin, spread (m annealed 0.2 -> 0.9, or fixed) or cross entropy, mean over the batch."""
    if config.loss == "ce":
        return F.cross_entropy(scores, labels)
    if config.loss == "margin":
        return encapnet.margin_loss(scores, labels)
    margin = 0.9 if config.loss == "spread-fixed" else 0.2 + 0.7 * progress
    return encapnet.spread_loss(scores, labels, margin)


def losses(run, images, labels, draws):
    """-> classification loss, feedback divergence and share of wrong answers of a batch, scalars"""
    config = run.config
    x = normalised(augmented(images, draws, run.data.side, config.augment, config.flip), run.data)
    scores, feedback = measure.forward(run.model, config, x)
    loss = classification_loss(config, scores, labels, run.progress)
    return loss, feedback, (scores.detach().argmax(1) != labels).float().mean()


def train_step(run, images, labels, draws):
    """One update -> (5,): loss, feedback divergence, share of wrong answers in this batch, norm of
    the gradient before clipping, 1 if it was clipped; on the device, nothing is waited for.
    """
    config = run.config
    loss, feedback, wrong = losses(run, images, labels, draws)
    run.optimizer.zero_grad(set_to_none=True)
    (loss + config.lam * feedback).backward()
    largest = config.clip or math.inf
    norm = nn.utils.clip_grad_norm_(run.net.parameters(), largest)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, run.progress)
    run.optimizer.step()
    return torch.stack([loss.detach(), feedback.detach(), wrong, norm, (norm > largest).float()])


def train_epoch(run):
    """From where the run stands to the end of the epoch; saves now and then, stops on a signal."""
    config, split = run.config, run.data.train
    order, draws = (t.to(run.device) for t in shuffle(len(split), config.seed, run.epoch))
    chunks = [order[k * run.batch:(k + 1) * run.batch][rank()::world()] for k in range(run.steps)]
    batches = split.batches(chunks[run.step:], run.device, config.workers)
    run.net.train()
    with tqdm(batches, f"epoch {run.epoch + 1}/{config.epochs}", run.steps, initial=run.step,
              leave=False, file=sys.stdout, disable=True if rank() else None) as bar:
        for images, labels, index in bar:
            torch.manual_seed(config.seed * 1_000_003 + run.epoch * run.steps + run.step)  # dropout
            values = train_step(run, images, labels, draws[index])
            run.step += 1
            run.totals[0] += 1
            run.totals[1:] += values
            if run.step % config.print_freq == 0 or run.step == run.steps:
                checkpoint.check_finite(run)
                if not bar.disable:
                    bar.set_postfix_str(f"loss {run.totals[1] / run.totals[0]:.4f}")
            due = time.monotonic() - run.saved >= config.save_every
            # 0: go on; 1: save; above: the number of a signal, save and stop
            action = torch.tensor(run.signals[0] if run.signals else int(due))
            if world() > 1:                               # one process's signal stops them all
                dist.all_reduce(action, dist.ReduceOp.MAX)
            if action > 0:
                checkpoint.save(run)
            if action > 1:
                number = int(action)
                raise Problem(f"stopped by {signal.Signals(number).name} in epoch {run.epoch + 1}, "
                              f"after step {run.step}; go on with: python train.py "
                              f"--resume {run.folder}", 128 + number)


def clock(seconds):
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}h{rest // 60:02}m" if hours else f"{rest // 60}m{rest % 60:02}s"


# ---- fit: a Config in, a result out --------------------------------------------------------------

def build_run(config, data, device):
    """A network with all that its training needs, before the first step."""
    torch.manual_seed(config.seed)
    net = make_model(config, len(data.classes), len(data.mean)).to(device)
    if config.channels_last and device.type == "cpu" and any(
            isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)
            and m.in_channels < 8 for m in net.modules()):
        say("--channels-last: off, some versions of torch crash in this network's narrow strided "
            "1x1 convolutions on a CPU")
        config = dataclasses.replace(config, channels_last=False)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)
    if world() > 1 and device.type == "cuda":             # on a CPU each process has its own
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    model = nn.parallel.DistributedDataParallel(net) if world() > 1 else net
    model = torch.compile(model) if config.compile else model
    optimizer = make_optimizer(config, net.parameters(), device)
    double = torch.float32 if device.type == "mps" else torch.float64
    header = {"config": dataclasses.asdict(config), "environment": environment(device)}
    return Run(config, data, device, net, model, optimizer, header,
               totals=torch.zeros(6, dtype=double, device=device))


def begin(run, state):
    """Bring a run to its start, or to where its checkpoint left it, and introduce it."""
    data, config = run.data, run.config
    if state:
        checkpoint.restore(run, state)
        if rank() == 0:
            (run.folder / "result.json").unlink(missing_ok=True)         # of fewer epochs
        say(f"{run.folder}: going on after epoch {run.epoch}, step {run.step}")
    else:
        look_at_routing(run)
    run.saved = time.monotonic()
    checkpoint.save(run, keep=False)                      # over a damaged one, if that it was
    checkpoint.write_log(run)
    weights = sum(p.numel() for p in run.net.parameters())
    say(f"{data.name}: {len(data.train):,} + {count(len(data.test), 'image')}, "
        f"{count(len(data.classes), 'class')}; {config.model}: {weights:,} parameters; "
        f"{count(config.epochs, 'epoch')}, recipe {config.recipe}, on "
        f"{environment(run.device)['device']}; after a stop go on with --resume {run.folder}")


def look_at_routing(run):
    """Record the agreement of votes before training, after 10 %, 40 % and all of it.   [Fig. 2]"""
    moments = {math.ceil(part * run.config.epochs) for part in (0, 0.1, 0.4, 1)}
    if hasattr(run.net, "routed") and run.epoch in moments:
        images, labels = measure.first_images(run, 64)
        found = measure.agreement(run.net, normalised(images, run.data), labels)
        run.moments.append({"epoch": run.epoch, **found})


def finish_epoch(run, images):
    """Test, log, print."""
    checkpoint.average_totals(run)
    n, *sums = run.totals.tolist()
    loss, feedback, wrong, norm, clipped = (total / n for total in sums)
    test = measure.evaluate(run)
    seconds = run.seconds + time.monotonic() - run.saved
    run.epoch, run.step = run.epoch + 1, 0
    run.totals.zero_()
    entry = {"epoch": run.epoch, "lr": run.optimizer.param_groups[0]["lr"], "loss": loss,
             "feedback": feedback, "gradient_norm": norm, "clipped_percent": 100 * clipped,
             "train_error": 100 * wrong, "test_error": test["error"],
             "test_top5_error": test["top5_error"],
             "time": {"seconds": seconds, "images_per_second": images}}
    run.history.append(entry)
    look_at_routing(run)
    left = seconds / run.epoch * (run.config.epochs - run.epoch)
    gradient = f"gradient {norm:.2g}" + f", {100 * clipped:.0f} % clipped" * (run.config.clip > 0)
    divergence = f"feedback {feedback:.4f}  " * (feedback != 0)          # 0: there is no unit
    say(f"epoch {run.epoch:3}/{run.config.epochs}  loss {loss:.4f}  {divergence}"
        f"{gradient}  error: train {100 * wrong:5.2f} %  {tested_on(run.config)} "
        f"{test['error']:5.2f} %  {images:,.0f} images/s  {clock(left)} left")
    if run.epoch == run.config.epochs:
        checkpoint.save(run)
    checkpoint.write_log(run)


def finish(run):
    """The result of a finished run, recorded in its folder and in runs/results.jsonl."""
    config, multi_crop = run.config, run.config.augment != "none"
    test = measure.evaluate(run, multi_crop)
    result = {
        "data": run.data.name, "seed": config.seed, "epochs": config.epochs, **test,
        "multi_crop": multi_crop,
        "outcome": "at chance" if measure.at_chance(run, test["error"]) else "ok",
        "unbalanced": measure.unbalanced(run.data.train.labels),
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "seconds": round(run.seconds, 1), "folder": str(run.folder), **run.header,
        "curves": {k: [e[k] for e in run.history]
                   for k in ("loss", "feedback", "train_error", "test_error")},
        "moments": run.moments, "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if rank() == 0:
        title = f"{config.model} on {run.data.name}, seed {config.seed}"
        draw_run(title, measure.chance_error(run), run.history, *measure.answered_images(run, 24),
                 run.data.classes, run.folder / "curves.png")
        write_file(run.folder / "result.json", json.dumps(result, indent=1).encode())
        record(result)
    return result


def fit(config):
    """Train as the Config says, from the start or where its output_dir stopped -> the result."""
    device = start(config)
    folder = [config.output_dir or (checkpoint.numbered_folder(config) if rank() == 0 else "")]
    if world() > 1:
        dist.broadcast_object_list(folder)
    folder = Path(folder[0])
    with checkpoint.locked(folder):                       # before images are read for an hour
        data = load_data(config, device)
        if unseen := len(data.classes) - len(data.train.labels.unique()):
            say(f"{data.name}: {count(unseen, 'class')} without a training image")
        if config.steps:
            epochs = round(config.steps * batch_size(config, len(data.train)) / len(data.train))
            config = dataclasses.replace(with_epochs(config, max(1, epochs)), steps=0)
        run = build_run(config, data, device)
        run.folder = folder
        state = checkpoint.load_checkpoint(folder) if checkpoint.begun(folder) else None
        if state:
            checkpoint.check_same(config, data, state, folder)
            result = folder / "result.json"
            if state["epoch"] == config.epochs and result.exists():
                say(f"{folder} is already finished")
                return json.loads(result.read_text())
        elif config.init:
            start_from(run, config.init)
        with checkpoint.caught_signals() as run.signals:
            begin(run, state)
            while run.epoch < config.epochs:
                since, before = time.monotonic(), run.step
                train_epoch(run)
                speed = (run.steps - before) * run.batch / max(1e-9, time.monotonic() - since)
                finish_epoch(run, speed)
            return finish(run)
