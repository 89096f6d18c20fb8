"""A run is never lost: checkpoints that survive anything, resume, lock, signals."""
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pickle
import signal
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lab.config import Config, data_name, identity
from lab.runtime import RUNS, Diverged, Problem, rank, reason, say, world, write_file

SAVED = ("epoch", "step", "totals", "history", "seconds", "moments", "header")


def due(run):
    return time.time() - run.saved >= run.config.save_every


def average_totals(run):
    """The epoch's sums so far, as a mean over the processes."""
    if world() > 1:
        dist.all_reduce(run.totals)
        run.totals /= world()


def check_finite(run, bad=None):
    """Stop before a NaN reaches a checkpoint, and name the step and the culprit."""
    names = ("the loss", "the feedback")
    losses = {} if bad is None else dict(zip(names, bad.tolist(), strict=True))
    losses = {name: step for name, step in losses.items() if step >= 0}
    where = f"epoch {run.epoch + 1}, step"
    hint = f"the last good checkpoint is in {run.folder}; a smaller --lr may help"
    state = {name: t for name, t in run.net.state_dict().items() if t.is_floating_point()}
    finite = torch.stack([t.isfinite().all() for t in state.values()])
    if losses and len(set(losses.values())) == len(losses):
        culprit = min(losses, key=losses.get)
        raise Diverged(f"{where} {losses[culprit]}: {culprit} is not finite; {hint}", 1)
    if losses or not finite.all():
        name = next((n for n, ok in zip(state, finite.tolist(), strict=True) if not ok),
                    "loss and feedback")
        step = min(losses.values(), default=run.step)
        raise Diverged(f"{where} {step}: {name} is not finite; {hint}", 1)


def save(run, bad=None):
    """Write the checkpoint unless it holds a NaN; keep the last one.  All processes call it."""
    average_totals(run)
    if rank() == 0:
        check_finite(run, bad)
        data = run.data
        state = {"config": {**dataclasses.asdict(run.config), "resume": None},
                 "data": {"name": data.name, "classes": data.classes, "mean": data.mean.cpu(),
                          "std": data.std.cpu()},
                 "net": run.net.state_dict(), "optimizer": run.optimizer.state_dict(),
                 "rng": torch.get_rng_state(), **{name: getattr(run, name) for name in SAVED}}
        if run.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(run.device)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(run.folder / "last.pt", buffer.getvalue(), keep=run.folder / "previous.pt")
    run.saved = time.time()


def read_checkpoint(path):
    """A checkpoint's contents, every byte checked, nothing executed."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        needed = {"config", "data", "net", "optimizer", *SAVED}
        if not isinstance(state, dict) or not needed <= set(state):
            raise ValueError("not written by train.py")
        Config(**state["config"])
        return state
    except FileNotFoundError:
        raise Problem(f"no checkpoint {path}") from None
    except pickle.UnpicklingError:
        raise Problem(f"{path} is refused: it holds more than tensors and plain values") from None
    except Exception as error:                            # a damaged file can raise anything
        raise Problem(f"{path} is damaged or not train.py's ({reason(error)})") from error


def run_folder(path):
    """The folder that --resume PATH means: itself, or the one of its last.pt."""
    path = Path(path)
    return path.parent if path.name in ("last.pt", "previous.pt") else path


def load_checkpoint(path, mend=False):
    """last.pt of a run's folder, or if that is damaged the one before, and says so; or any file.

    mend: put a damaged last.pt aside, lest the next save make it previous.pt
    """
    path, folder = Path(path), run_folder(path)
    if not folder.is_dir():
        return read_checkpoint(path)
    complaints = []
    for name in ("last.pt", "previous.pt"):
        if (folder / name).exists():
            try:
                state = read_checkpoint(folder / name)
                if complaints:
                    say(f"{complaints[0]}: using {folder / name}, of epoch {state['epoch']}, "
                        f"step {state['step']}")
                if complaints and mend and rank() == 0:
                    os.replace(folder / "last.pt", folder / "last.damaged")
                return state
            except Problem as problem:
                complaints.append(str(problem))
    raise Problem("; ".join(complaints) or f"no checkpoint (last.pt) in {folder}")


def check_same(config, state):
    """Refuse to resume a checkpoint of another configuration, and name the fields."""
    ours, theirs = identity(config), identity(Config(**state["config"]))
    theirs["dataset"] = state["data"]["name"]
    changed = [f"{name} {theirs[name]!r} -> {ours[name]!r}" for name in ours
               if ours[name] != theirs[name]]
    then, now = state["config"]["epochs"], config.epochs
    if now < state["epoch"] or (now != then and config.schedule == "one-cycle"):
        changed.append(f"epochs {then!r} -> {now!r}")
    if changed:
        raise Problem(f"{run_folder(config.resume)} was trained otherwise ({'; '.join(changed)}); "
                      "only --epochs may grow, with --schedule steps")


def restore(run, state):
    """Bring a fresh run to where a checkpoint of the same configuration left off."""
    check_same(run.config, state)
    try:
        if state["data"]["classes"] != run.data.classes:
            raise ValueError("other classes")
        run.net.load_state_dict(plain_names(state["net"]))
        run.optimizer.load_state_dict(state["optimizer"])
        for name in SAVED:
            setattr(run, name, state[name])
        run.totals = F.pad(run.totals, (0, 6 - len(run.totals))).to(run.device)   # 4 before --clip
        run.header["config"]["epochs"] = run.config.epochs
        torch.set_rng_state(state["rng"])
        if run.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{run.folder}: the checkpoint does not fit ({reason(error)})") from error


def plain_names(state):
    """Weights saved from a compiled or distributed model under the names of the plain one."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): t for name, t in state.items()}


def write_log(run, *more):
    """log.jsonl anew, header and an entry an epoch: replaced whole, so readable after any kill."""
    if rank() == 0:
        lines = [run.header, *run.history, *more]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_file(run.folder / "log.jsonl", text.encode())


@contextlib.contextmanager
def locked(folder):
    """Refuse a folder that another process works in; the kernel unlocks when that one dies."""
    if rank() > 0:
        yield
        return
    try:
        import fcntl
    except ImportError:                                   # Windows: no lock
        fcntl = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise Problem(f"--output-dir {folder}: {error.strerror}") from error
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Problem(f"{folder} is in use by another run") from None
        yield


@contextlib.contextmanager
def caught_signals():
    """SIGTERM and SIGINT collect in a list instead of killing; another a second later does kill."""
    signals, first = [], []

    def handler(number, frame):
        if signals and time.time() - first[0] > 1:        # torchrun repeats what a terminal sent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first.append(time.time())
        signals.append(number)

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:                                    # not the main thread
        before = {}
    try:
        yield signals
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def newest(wanted, finished=False):
    """The newest run in runs/ whose Config has the wanted fields, finished or not as asked."""
    for log in sorted(RUNS.glob("*/log.jsonl"), key=lambda p: p.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            config = json.loads(log.read_text().partition("\n")[0])["config"]
            same = all(config[k] == v for k, v in json.loads(json.dumps(wanted)).items())
            if same and (finished or not (log.parent / "result.json").exists()):
                return log.parent
    return None


def check_free(folder):
    """Refuse to start anew where a run is."""
    if (folder / "result.json").exists():
        raise Problem(f"{folder} holds a finished run: choose another --output-dir, or train on: "
                      f"--resume {folder} --epochs N")
    if (folder / "last.pt").exists() or (folder / "previous.pt").exists():
        raise Problem(f"{folder} holds an unfinished run: go on with --resume {folder}, or choose "
                      "another --output-dir")


def numbered_folder(config):
    """The next free one of runs/DATASET-MODEL-0, -1, ..."""
    for k in itertools.count():
        folder = RUNS / f"{data_name(config)}-{config.model}-{k}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
