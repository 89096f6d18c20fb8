"""A run is never lost: checkpoints that survive anything, and how a run goes on from one."""
import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from lab.config import Config
from lab.results import data_name, identity
from lab.runtime import RUNS, Diverged, Problem, rank, reason, say, world, write_file

SAVED = ("epoch", "step", "totals", "history", "seconds", "moments", "header")


def average_totals(run):
    """The epoch's sums so far, as a mean over the processes."""
    if world() > 1:
        dist.all_reduce(run.totals)
        run.totals /= world()


def check_finite(run):
    """Stop before a NaN reaches a checkpoint, and name the culprit."""
    values = {"the loss": run.totals[1], "the feedback": run.totals[2], **run.net.state_dict()}
    finite = torch.stack([t.isfinite().all() for t in values.values()]).tolist()
    if not all(finite):
        culprit = list(values)[finite.index(False)]
        raise Diverged(f"epoch {run.epoch + 1}, by step {run.step}: {culprit} is not finite; the "
                       f"last good checkpoint is in {run.folder}; a smaller --lr may help", 1)


def save(run, keep=True):
    """Write last.pt, unless it would hold a NaN; the one before becomes previous.pt, or is lost."""
    now = time.monotonic()
    run.seconds, run.saved = run.seconds + now - run.saved, now
    average_totals(run)
    if rank() == 0:
        check_finite(run)
        known = ("name", "classes", "source", "mean", "std")
        state = {"config": dataclasses.asdict(run.config),
                 "data": {name: getattr(run.data, name) for name in known},
                 "net": run.net.state_dict(), "optimizer": run.optimizer.state_dict(),
                 **{name: getattr(run, name) for name in SAVED}}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(run.folder / "last.pt", buffer.getvalue(),
                   keep=run.folder / "previous.pt" if keep else None)


def read_checkpoint(path):
    """A checkpoint's contents, every byte checked, nothing executed."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        Config(**state["config"])                         # train.py's, or these raise
        dict(**state["data"])
        return state
    except FileNotFoundError as error:
        raise Problem(f"{path}: there is no such checkpoint") from error
    except Exception as error:                            # a damaged file can raise anything
        raise Problem(f"{path} is damaged or not train.py's ({reason(error)})") from error


def run_folder(path):
    """The folder that --resume PATH means: itself, or the one of its last.pt."""
    path = Path(path)
    return path.parent if path.name in ("last.pt", "previous.pt") else path


def begun(folder):
    """Whether there is a run to go on with."""
    return any((folder / name).exists() for name in ("last.pt", "previous.pt"))


def load_checkpoint(path):
    """last.pt of a run's folder, or if that is damaged the one before, and says so; or any file."""
    path = run_folder(path)
    if not path.exists():
        raise Problem(f"there is no run {path}")
    if not path.is_dir():
        return read_checkpoint(path)
    try:
        return read_checkpoint(path / "last.pt")
    except Problem as problem:
        before = path / "previous.pt"
        if not before.exists():
            raise
        say(f"{problem}: using {before}")
        return read_checkpoint(before)


def check_same(config, data, state, folder):
    """Refuse to resume a checkpoint of another configuration or of other images."""
    before = Config(**state["config"])
    ours, theirs = ({**identity(c), "dataset": c.dataset} for c in (config, before))
    if config.epochs < state["epoch"] or config.schedule == "one-cycle":
        ours["epochs"], theirs["epochs"] = config.epochs, before.epochs
    changed = [f"{name} {theirs[name]!r} -> {ours[name]!r}" for name in ours
               if ours[name] != theirs[name]]
    if changed:
        raise Problem(f"{folder} was trained otherwise ({'; '.join(changed)}); for another run "
                      "choose another --output-dir; for more epochs, with --schedule steps, "
                      f"--resume {folder} --epochs N")
    then = state["data"]
    if (then["classes"], then["source"]) != (data.classes, data.source):
        raise Problem(f"{folder} was trained on other images than {config.data_path} has now: "
                      f"give --data-path where they are, or start anew with --init {folder}")


def load_weights(net, state, path, keep=()):
    """A checkpoint's weights into a network, but for those to keep."""
    mine, theirs = net.state_dict(), state["config"]
    try:
        net.load_state_dict({**state["net"], **{name: mine[name] for name in keep}})
    except (RuntimeError, AttributeError, TypeError) as error:
        words = " ".join([theirs["model"], *(f"{k}={v}" for k, v in theirs["set"].items())])
        raise Problem(f"{path}, weights of {words}, does not fit this network: "
                      f"{' '.join(str(error).split())[:200]}") from error


def restore(run, state):
    """Bring a fresh run to where a checkpoint of the same configuration left off."""
    load_weights(run.net, state, run.folder)
    run.optimizer.load_state_dict(state["optimizer"])
    for name in SAVED:
        setattr(run, name, state[name])
    run.totals = run.totals.to(run.device)
    run.header["config"]["epochs"] = run.config.epochs


def write_log(run):
    """Write log.jsonl, a header and one entry per epoch, as a whole: readable after any kill."""
    if rank() == 0:
        text = "".join(json.dumps(line) + "\n" for line in [run.header, *run.history])
        write_file(run.folder / "log.jsonl", text.encode())


def newest(finished=False):
    """The run in runs/ that was saved last, an unfinished one unless finished ones will do."""
    for folder in sorted(RUNS.glob("*"), key=lambda folder: folder.stat().st_mtime, reverse=True):
        if begun(folder) and (finished or not (folder / "result.json").exists()):
            say(f"newest run: {folder}")
            return str(folder)
    return None


def numbered_folder(config):
    """The next free one of runs/DATASET-MODEL-0, -1, ..."""
    for k in itertools.count():
        folder = RUNS / f"{data_name(config)}-{config.model}-{k}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.exists():                       # runs/ is a link to nothing
                raise


@contextlib.contextmanager
def locked(folder):
    """Refuse a folder that another process works in; remove one in which no run begins."""
    if rank() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(f"{folder} is in use by another run") from None
        except (ImportError, OSError) as error:           # Windows; some network file systems
            say(f"no locks here ({reason(error)}): let no two runs share a folder")
        try:
            yield
        finally:
            if not begun(folder):
                with contextlib.suppress(OSError):        # it holds something else
                    (folder / "lock").unlink()
                    folder.rmdir()


@contextlib.contextmanager
def caught_signals():
    """SIGTERM and SIGINT collect in a list instead of killing; another a second later does kill."""
    signals, first = [], []

    def handler(number, frame):
        if signals and time.monotonic() - first[0] > 1:   # torchrun repeats what a terminal sent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first.append(time.monotonic())
        signals.append(number)

    main = threading.current_thread() is threading.main_thread()         # others may not
    caught = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = {s: signal.signal(s, handler) for s in caught}
    try:
        yield signals
    finally:
        for number, action in before.items():
            signal.signal(number, action)
