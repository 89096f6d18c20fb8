"""train.py: command line, data sets, resume, faults, several processes.

Runs without faults go through train.main in this process; faults are caused for real, in processes
forked from a server that has imported torch once (a fork costs 0.1 s, an import 5).
"""
import functools
import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.datasets as tv
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image
from torchvision.transforms.v2 import functional as T

import bench
import encapnet
import train
from train import CELL, GLYPH, POSE, TYPEFACES, draw_digits, pose_glyphs, rasterise

HERE = Path(__file__).parent
NARROW = "--model encapnet-small --set types=2 --set dims=(1,1,2,2)"
SMALL = "--train-images 32 --test-images 10 --batch-size 8"
TINY = f"{NARROW} {SMALL} --epochs 1"
FOLDER = f"--dataset folder {TINY} --lr 1e-3"             # in data/, which `place` has


# ------------------------------------------------------------------------------------------------
# Ways to run train.py
# ------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    code: int
    out: str
    err: str = ""

    def last(self):
        """Only the last line: what a child says before it fails is no error."""
        return self._replace(err=self.err.rstrip("\n").rpartition("\n")[2] + "\n")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """{train,test}/{ant,bee,cat}/*.png: coloured noise, a colour a class."""
    root, random = tmp_path_factory.mktemp("x") / "pictures", np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 5)):
        for c, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for k in range(n):
                pixels = random.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[..., c] += 55
                Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


@pytest.fixture
def place(tmp_path, pictures):
    """An empty working directory but for data/."""
    (tmp_path / "data").symlink_to(pictures)
    return tmp_path


@pytest.fixture
def cli(place, monkeypatch, capsys):
    """cli("--flag value", ...) runs train.main in `place` -> Done."""
    monkeypatch.chdir(place)

    def run(*words):
        code = train.main([w for part in words for w in shlex.split(str(part))])
        return Done(code or 0, *capsys.readouterr())
    return run


def assert_one_line(done, *wanted, code=2):
    """A user's mistake: one line on stderr that says what is wanted, and this exit code."""
    assert done.code == code, done
    assert done.err.count("\n") == 1 and "Traceback" not in done.err + done.out, done
    assert "unexpected" not in done.err, done
    for part in wanted:
        assert str(part) in done.err, (part, done.err)


server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["test_train", "torchvision.transforms.v2", "matplotlib.figure",
                               "matplotlib.backends.backend_agg", "torch.optim"])
running = []


def child(words, folder, output, env, sabotage):
    os.chdir(folder)
    os.environ.update(env)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Grad strides do not match")
    torch.set_num_threads(1)
    train.draw_run = lambda run: None                     # costs a second; drawn in other tests
    for act in sabotage:
        act()
    sys.exit(train.main(words))


class Job:
    """A real process that runs train.py in a folder, with acts of sabotage done in it first."""

    def __init__(self, folder, *words, env=None, sabotage=()):
        self.output = Path(folder) / f"output-{time.monotonic_ns()}.txt"
        words = [w for part in words for w in shlex.split(str(part))]
        self.process = server.Process(
            target=child, args=(words, str(folder), str(self.output), env or {}, sabotage))
        self.process.start()
        running.append(self.process)

    def wait(self, seconds=120):
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"hangs: {self.output.read_text()}"
        text = self.output.read_text()
        assert "Traceback" not in text, text
        return Done(self.process.exitcode, text, text)


def run(folder, *words, **keywords):
    return Job(folder, *words, **keywords).wait()


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    for process in running:
        if process.is_alive():
            process.kill()
            process.join()
    running.clear()


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_processes(folder, *words, sabotage=((), ())):
    """What torchrun starts -> [Job of rank 0, Job of rank 1]."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    return [Job(folder, *words, sabotage=sabotage[rank],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]


# Sabotage


def at_step(k, act):
    """After the k-th update of the weights, act(optimizer)."""
    step, count = torch.optim.Adam.step, iter(range(1, 10**9))

    def stepped(self, *arguments, **keywords):
        step(self, *arguments, **keywords)
        if next(count) == k:
            act(self)
    torch.optim.Adam.step = stepped


def send(number, optimizer=None):
    os.kill(os.getpid(), number)


def full_disk(optimizer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def poison(optimizer):
    optimizer.param_groups[0]["params"][2].data.view(-1)[0] = float("nan")


def kill_at(k):
    return functools.partial(at_step, k, functools.partial(send, signal.SIGKILL))


def kill_in_write(moment):
    """kill -9 at a moment of the second save: before an os.fsync or os.replace, or after it."""
    fsync, replace, count = os.fsync, os.replace, iter(range(10**9))

    def watched(call, name, *words):
        if name == moment and next(count) == 1:
            send(signal.SIGKILL)
        call(*words)
        if f"after {name}" == moment and next(count) == 1:
            send(signal.SIGKILL)
    os.fsync = lambda fd: watched(
        fsync, f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}", fd)
    os.replace = lambda a, b: watched(replace, f"{Path(a).name} > {Path(b).name}", a, b)


def nan_loss(k):
    true, count = encapnet.margin_loss, iter(range(1, 10**9))
    encapnet.margin_loss = lambda *a: true(*a) * (float("nan") if next(count) == k else 1)


def nan_feedback(k):
    cls, count = encapnet.MODELS["encapnet-small"][0], iter(range(1, 10**9))
    true = cls.forward

    def forward(self, x):
        scores, feedback = true(self, x)
        poisoned = self.training and next(count) == k
        return scores, feedback * (float("nan") if poisoned else 1)
    cls.forward = forward


# ------------------------------------------------------------------------------------------------
# A run is never lost: resume is exact
# ------------------------------------------------------------------------------------------------

# twelve steps with everything that is random or annealed: 4 an epoch, saved after each
EXACT = f"{FOLDER} --epochs 3 --augment ++ --flip --loss spread --save-every 0 --output-dir run"


def state_of(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def log_of(folder):
    """The log without what may differ between equal runs: times and places."""
    header, *epochs = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    config = {k: v for k, v in header["config"].items() if k not in ("output_dir", "resume")}
    return [config, *({k: v for k, v in e.items() if k != "time"} for e in epochs)]


def flat(tree):
    """The leaves of nested dicts and lists, in order."""
    if isinstance(tree, dict):
        return [leaf for k in tree for leaf in [k, *flat(tree[k])]]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in flat(item)]
    return [tree]


def assert_same_run(a, b):
    ours, theirs = state_of(a), state_of(b)
    for part in ("net", "optimizer"):
        for x, y in zip(flat(ours[part]), flat(theirs[part]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert log_of(a) == log_of(b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, pictures):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "data").symlink_to(pictures)
    done = run(folder, EXACT)
    assert done.code == 0 and "test error" in done.out
    assert len(log_of(folder / "run")) == 4
    return folder / "run"


@pytest.fixture(scope="module")
def half_run(tmp_path_factory, pictures):
    """A run killed after step 6 of 12 (copy it): last.pt holds step 5, previous.pt step 4."""
    folder = tmp_path_factory.mktemp("half") / "run"
    (folder.parent / "data").symlink_to(pictures)
    assert run(folder.parent, EXACT, sabotage=[kill_at(6)]).code == -9
    return folder


@pytest.fixture
def half(half_run, place):
    return Path(shutil.copytree(half_run, place / "run"))


@pytest.mark.parametrize("steps", [(1,), (4, 3), (7, 2)])
def test_kill_9_at_any_step_then_resume_is_exact(steps, reference, place):
    first, *others = steps
    done = run(place, EXACT, sabotage=[kill_at(first)])
    assert done.code == -signal.SIGKILL
    for k in others:
        assert run(place, "--resume run", sabotage=[kill_at(k)]).code == -signal.SIGKILL
        [json.loads(line) for line in (place / "run/log.jsonl").read_text().splitlines()]
    done = run(place, "--resume run")
    assert done.code == 0 and "going on after" in done.out
    assert_same_run(place / "run", reference)


def test_steps_since_the_last_save_are_repeated_exactly(reference, place):
    rarely = EXACT.replace("--save-every 0", "--save-every 1000")
    assert run(place, rarely, sabotage=[kill_at(6)]).code == -9
    assert state_of(place / "run")["epoch"] == 0
    assert run(place, "--resume run --save-every 0").code == 0
    assert_same_run_but(place / "run", reference, "save_every")


def assert_same_run_but(a, b, *fields):
    ours, theirs = log_of(a), log_of(b)
    assert [{**ours[0], **{f: theirs[0][f] for f in fields}}, *ours[1:]] == theirs
    for x, y in zip(flat(state_of(a)["net"]), flat(state_of(b)["net"]), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_kill_9_at_each_moment_of_writing_a_checkpoint(reference, place):
    """A save: fsync, rename last to previous, rename new to last, fsync of the folder."""
    start, seen = EXACT, []
    for moment in ("fsync last.pt.tmp", "last.pt > previous.pt", "last.pt.tmp > last.pt",
                   "after last.pt.tmp > last.pt"):
        act = functools.partial(kill_in_write, moment)
        assert run(place, start, sabotage=[act]).code == -9
        seen.append([(place / "run" / name).exists() for name in ("last.pt", "last.pt.tmp")])
        start = "--resume run"
    assert seen == [[True, True], [True, True], [False, True], [True, False]]
    assert run(place, "--resume run").code == 0
    assert_same_run(place / "run", reference)
    assert not (place / "run/last.pt.tmp").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_exits(number, code, reference, place):
    act = functools.partial(at_step, 6, functools.partial(send, number))
    rarely = EXACT.replace("--save-every 0", "--save-every 1000")
    done = run(place, rarely, sabotage=[act])
    assert_one_line(done.last(), number.name, "--resume run", code=code)
    state = state_of(place / "run")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert run(place, "--resume").code == 2            # the newest in runs/: there is none
    assert run(place, "--resume run").code == 0
    assert_same_run_but(place / "run", reference, "save_every")


def cut(share):
    def damage(content):
        return content[:int(len(content) * share)]
    return damage


def flip_a_byte(content):
    """In the largest array; most of a small file is padding, where a flip does no harm."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        record = max((r for r in file.infolist() if "/data/" in r.filename),
                     key=lambda r: r.file_size)
        k = content.index(file.read(record), record.header_offset) + record.file_size // 2
    return content[:k] + bytes([content[k] ^ 0x10]) + content[k + 1:]


@pytest.mark.parametrize("damage", [cut(0), cut(.01), cut(.5), cut(.999), flip_a_byte],
                         ids=["0", "1%", "50%", "99.9%", "flip"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, half, reference, place):
    (half / "last.pt").write_bytes(damage((half / "last.pt").read_bytes()))
    done = run(place, "--resume run")
    assert done.code == 0 and "last.pt is damaged" in done.out, done
    assert "using run/previous.pt" in done.out
    assert_same_run(half, reference)


def test_both_checkpoints_damaged_stop_and_touch_nothing(half, place):
    for name, damage in (("last.pt", cut(.5)), ("previous.pt", flip_a_byte)):
        (half / name).write_bytes(damage((half / name).read_bytes()))
    before = {p: p.read_bytes() for p in half.iterdir()}
    for words in ("--resume run", EXACT):
        done = run(place, words)
        assert_one_line(done, "last.pt" if "resume" in words else "unfinished run")
    assert {p: p.read_bytes() for p in half.iterdir()} == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_hostile_checkpoint_is_refused_and_does_not_run(half, place):
    torch.save({**state_of(half), "header": Evil()}, half / "evil.pt")
    (half / "bare.pt").write_bytes(pickle.dumps(Evil()))
    for path in ("run/evil.pt", "run/bare.pt"):
        for command in ("", "--test-only", "--predict x.png"):
            assert_one_line(run(place, f"--resume {path} {command}"), path)
    assert not (place / "executed").exists()
    shutil.copy(half / "evil.pt", half / "last.pt")       # a folder falls back, or refuses
    assert "last.pt is refused" in run(place, "--resume run --test-only").out
    assert not (place / "executed").exists()


def test_a_full_disk_leaves_the_old_checkpoint(reference, place):
    done = run(place, EXACT, sabotage=[functools.partial(at_step, 6,
                                                                                full_disk)])
    assert done.code == 1 and "cannot write run/last.pt" in done.out.splitlines()[-1]
    assert state_of(place / "run")["step"] == 1 and not list(place.glob("run/*.tmp"))
    assert run(place, "--resume run").code == 0
    assert_same_run(place / "run", reference)


@pytest.mark.parametrize("act, culprit, step", [
    (functools.partial(nan_loss, 6), "the loss", 2),
    (functools.partial(nan_feedback, 6), "the feedback", 2),
    (functools.partial(at_step, 6, poison), "PARAMETER", 2),
])
def test_a_nan_is_stopped_named_and_not_saved(act, culprit, step, place):
    margin = EXACT.replace("--loss spread", "--loss margin")
    done = run(place, margin, sabotage=[act])
    state = state_of(place / "run")
    if culprit == "PARAMETER":
        culprit = list(state["net"])[2]
    last = done.out.splitlines()[-1]
    assert done.code == 1 and f"epoch 2, step {step}: {culprit} is not finite" in last, last
    assert (state["epoch"], state["step"]) == (1, step - 1)
    assert all(t.isfinite().all() for t in state["net"].values() if t.is_floating_point())
    assert run(place, "--resume run").code == 0        # without the sabotage all is well


def test_a_second_run_in_the_same_folder_is_refused(half, place):
    holder = Job(place, "--resume run", sabotage=[functools.partial(at_step, 1, sleep)])
    wait_for(lambda: "going on after" in holder.output.read_text() if holder.output.exists()
             else False)
    assert_one_line(run(place, "--resume run").last(), "in use by another run")
    holder.process.kill()
    holder.process.join()
    assert run(place, "--resume run").code == 0        # the lock died with its holder


def sleep(optimizer):
    time.sleep(100)


def wait_for(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_another_configuration_is_refused_and_named(half, place):
    for words, field in (("--set types=4", "set"), ("--augment none", "augment"),
                         ("--batch-size 4", "batch_size 8 -> 4"), ("--seed 1", "seed 0 -> 1"),
                         ("--lr 0.1", "lr"), ("--train-images 30", "train_images"),
                         ("--dataset digits", "dataset"), ("--epochs 0", "epochs")):
        assert_one_line(run(place, "--resume run", words).last(), field, "trained otherwise")
    assert_one_line(run(place, "--resume run --model encapnet6").last(), "model")
    assert_one_line(run(place, EXACT), "unfinished run")


def test_epochs_may_grow_with_the_run_as_if_planned(reference, place):
    """Steps of the schedule are given, so that the longer plan changes nothing before."""
    loss = EXACT.replace("spread", "margin") + " --milestones 2 --gamma 0.5"
    assert run(place, loss, "--output-dir long --epochs 3").code == 0
    assert run(place, loss, "--output-dir run --epochs 1").code == 0
    assert run(place, "--resume run --epochs 3 --milestones 2").code == 0
    assert_same_run(place / "run", place / "long")
    assert [e["lr"] for e in log_of(place / "run")[1:]] == [1e-3, 1e-3, 5e-4]
    done = run(place, "--resume run")
    assert done.code == 0 and "already finished" in done.out


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------

GLOBAL = f"{FOLDER} --workers 0 --weight-decay 0 --output-dir run"


def test_two_processes_do_what_one_does(place):
    """Loss, feedback over the gathered batch, gradient, and the count of evaluated images."""
    words = GLOBAL + " --optimizer sgd --batch-size 32 --augment ++ --flip --test-images 13"
    for name in ("one", "two"):
        (place / name).mkdir()
        (place / name / "data").symlink_to((place / "data").resolve())
    pair = two_processes(place / "two", words)
    assert run(place / "one", words).code == 0
    done = [job.wait() for job in pair]
    assert [d.code for d in done] == [0, 0]
    assert "test error" in done[0].out and done[1].out == ""          # rank 0 alone speaks
    one, two = state_of(place / "one/run"), state_of(place / "two/run")
    assert list(one["net"]) == list(two["net"])                       # no prefix of DDP
    gradients, others = ([m["momentum_buffer"] for m in state["optimizer"]["state"].values()]
                         for state in (one, two))         # what they are after one step
    whole = torch.cat([g.flatten() for g in gradients]).norm()
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient - other).norm() < 1e-3 * gradient.norm() + 1e-5 * whole
    for name, t in one["net"].items():
        torch.testing.assert_close(two["net"][name], t, rtol=1e-3, atol=1e-5)
    ours, theirs = log_of(place / "one/run")[1], log_of(place / "two/run")[1]
    for name in ("loss", "feedback", "train_error"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert ours["feedback"] > 0
    results = [json.loads((place / n / "run/result.json").read_text()) for n in ("one", "two")]
    assert [r["images"] for r in results] == [13, 13]
    assert results[0]["error"] == results[1]["error"]
    assert len((place / "two/runs/results.jsonl").read_text().splitlines()) == 1


def test_a_killed_rank_ends_the_job_which_can_be_resumed(place, tmp_path_factory):
    words = GLOBAL + " --epochs 3 --save-every 0 --augment +"
    whole = tmp_path_factory.mktemp("whole")
    (whole / "data").symlink_to((place / "data").resolve())
    for job in two_processes(whole, words):
        assert job.wait().code == 0
    jobs = two_processes(place, words, sabotage=((), [kill_at(6)]))
    done = [job.wait() for job in jobs]
    assert done[1].code == -9 and done[0].code == 1 and "train.py: " in done[0].err, done
    assert state_of(place / "run")["epoch"] == 1
    for job in two_processes(place, "--resume run"):
        assert job.wait().code == 0
    assert_same_run(place / "run", whole / "run")


def test_signal_to_one_rank_stops_both_after_the_same_step(place):
    act = functools.partial(at_step, 2, functools.partial(send, signal.SIGTERM))
    jobs = two_processes(place, GLOBAL, sabotage=((), [act]))
    assert [job.wait().code for job in jobs] == [143, 143]
    assert (state_of(place / "run")["epoch"], state_of(place / "run")["step"]) == (0, 2)


def test_torchrun_restarts_by_itself(place):
    """The real torchrun; one rank dies once, on its first start."""
    script = place / "dies_once.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import torch
torch.set_num_threads(1)
import test_train, train
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    test_train.kill_at(6)()
train.draw_run = lambda run: None
sys.exit(train.main())
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--max-restarts", "1", "--master-port", str(port()), str(script),
               *shlex.split(GLOBAL + " --epochs 3 --save-every 0")]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done
    assert "going on after epoch 1, step 1" in done.stdout and "test error" in done.stdout
    assert len(log_of(place / "run")) == 4


# ------------------------------------------------------------------------------------------------
# Load
# ------------------------------------------------------------------------------------------------


def watch_resources(every, file):
    """Append resident kilobytes and open files to `file` at every so many steps."""
    def look(optimizer):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(file, "a") as out:
            out.write(f"{pages * 4} {len(os.listdir('/proc/self/fd'))}\n")
    step, count = torch.optim.Adam.step, iter(range(1, 10**9))

    def stepped(self, *arguments, **keywords):
        step(self, *arguments, **keywords)
        if next(count) % every == 0:
            look(self)
    torch.optim.Adam.step = stepped


@pytest.mark.parametrize("epochs", [25, pytest.param(1250, marks=pytest.mark.slow)])
def test_memory_and_open_files_do_not_grow(epochs, place):
    """16 steps an epoch, a save every other second."""
    act = functools.partial(watch_resources, epochs, str(place / "seen.txt"))
    done = Job(place, FOLDER, f"--batch-size 2 --epochs {epochs} --save-every 2",
               "--set feedback=0 --output-dir run", sabotage=[act]).wait(3600)
    assert done.code == 0
    memory, files = zip(*(map(int, line.split())
                          for line in (place / "seen.txt").read_text().splitlines()), strict=True)
    assert len(memory) == 16 and max(files) <= files[3]
    assert max(memory) - memory[3] < 15_000, memory       # kilobytes


# ------------------------------------------------------------------------------------------------
# Data sets in their own formats, whole and damaged
# ------------------------------------------------------------------------------------------------

COUNTS = {"train": 24, "test": 9}
TENSORS = ("mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def md5(path):
    import hashlib
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(root, name, truth):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, split in (("train", "train"), ("t10k", "test")):
        images, labels = truth[split]
        for kind, code, array in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
            head = bytes([0, 0, 8, code]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = head + array.astype(np.uint8).tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)
            (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def write_cifar(root, dataset, truth, monkeypatch):
    cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[dataset]
    folder, key = root / cls.base_folder, "labels" if dataset == "cifar10" else "fine_labels"
    folder.mkdir(parents=True)
    names = {"train": [f for f, _ in cls.train_list], "test": [f for f, _ in cls.test_list]}
    for split, files in names.items():
        images, labels = truth[split]
        for file, x, y in zip(files, np.array_split(images, len(files)),
                              np.array_split(labels, len(files)), strict=True):
            batch = {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), key: y.tolist()}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    classes = [f"class {k}" for k in range(10 if dataset == "cifar10" else 100)]
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: classes}, protocol=2))
    for split, files in names.items():                    # ours in place of the true checksums
        monkeypatch.setattr(cls, f"{split}_list", [[f, md5(folder / f)] for f in files])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})


def write_svhn(root, truth, monkeypatch):
    from scipy.io import savemat
    root.mkdir(parents=True)
    lists = {}
    for split, (images, labels) in truth.items():
        file = root / f"{split}_32x32.mat"
        savemat(file, {"X": images.transpose(1, 2, 3, 0),
                       "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)})
        lists[split] = ["no address", file.name, md5(file)]
    monkeypatch.setattr(tv.SVHN, "split_list", lists)


@pytest.fixture(params=TENSORS)
def on_disk(request, tmp_path, monkeypatch, no_network):
    """A data set's files as its makers write them -> its name, what they hold."""
    name, random = request.param, np.random.default_rng(0)
    side = (28, 28) if "mnist" in name else (32, 32, 3)
    truth = {split: (random.integers(0, 256, (n, *side), dtype=np.uint8),
                     np.arange(n) % 10) for split, n in COUNTS.items()}
    if "mnist" in name:
        write_idx(tmp_path / "own", {"mnist": "MNIST"}.get(name, "FashionMNIST"), truth)
    elif "cifar" in name:
        write_cifar(tmp_path / "own", name, truth, monkeypatch)
    else:
        write_svhn(tmp_path / "own", truth, monkeypatch)
    return name, truth


def load(**fields):
    return train.load_data(train.make_config(**fields), torch.device("cpu"))


def test_a_data_set_is_read_as_written(on_disk, cli):
    name, truth = on_disk
    data = load(dataset=name, data_path="own")
    assert len(data.classes) == (100 if name == "cifar100" else 10)
    for split, part in (("train", data.train), ("test", data.test)):
        images = torch.tensor(truth[split][0])
        images = F.pad(images[:, None], [2] * 4) if images.dim() == 3 \
            else images.permute(0, 3, 1, 2)
        assert torch.equal(part.images, images)
        assert part.labels.tolist() == truth[split][1].tolist()
    x = data.train.images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(data.mean, x.mean(1).float())
    torch.testing.assert_close(data.std, x.std(1, correction=0).float(), rtol=1e-3, atol=1e-4)
    done = cli(f"--dataset {name} --data-path own --epochs 1", NARROW, "--batch-size 8")
    assert done.code == 0 and f"{name}: 24 + 9 images" in done.out, done


def test_a_damaged_data_set_is_one_line(on_disk, cli):
    name, _ = on_disk
    files = [f for f in sorted(Path("own").rglob("*")) if f.is_file() and "meta" not in f.name]
    victim = next(f for f in files if re.search("train.*images|data_batch_3|train", f.name))
    victim.write_bytes(victim.read_bytes()[:-100])
    train.read_data.cache_clear()
    done = cli(f"--dataset {name} --data-path own --epochs 0", NARROW)
    assert done.code == 2, done
    last = done.err.strip().splitlines()[-1]
    assert name in last and "put a fresh copy of" in last and "own" in last, done
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name, file", [
    ("mnist", "ubyte.gz"), ("fashion-mnist", "ubyte.gz"), ("svhn", "train_32x32.mat"),
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_offline_the_message_says_which_file_to_put_where(name, file, cli, no_network):
    done = cli(f"--dataset {name} --data-path nowhere", NARROW)
    assert done.code == 2 and file in done.err.splitlines()[-1] and "nowhere" in done.err


def test_a_folder_of_images_of_every_kind(cli):
    """Grey, palette, palette with transparency, RGBA, 16 bits, 1 bit, CMYK, rotated by EXIF."""
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    grey = Image.fromarray(ramp)
    palette = grey.convert("RGB").quantize(32)
    rgba = grey.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 3                                      # upside down
    kinds = {"grey.png": grey, "palette.png": palette, "rgba.png": rgba, "la.png":
             grey.convert("LA"), "cmyk.tif": grey.convert("CMYK"),
             "deep.png": Image.fromarray(ramp.astype(np.uint16) * 257)}
    for split in ("train", "test"):
        folder = Path("own") / split / "ramp"
        folder.mkdir(parents=True)
        for name, image in kinds.items():
            image.save(folder / name)
        grey.rotate(180).save(folder / "turned.png", exif=exif)
        palette.save(folder / "clear.gif", transparency=0)
        grey.convert("1").save(folder / "bits.png")
        grey.resize((64, 48)).save(folder / "wide.jpg")
    data = load(dataset="folder", data_path="own", model="encapnet-small")
    names = sorted(p.name for p in Path("own/train/ramp").iterdir())
    pixels = dict(zip(names, data.train.images.int(), strict=True))
    assert data.train.images.shape == (10, 3, 32, 32)
    for name in (*kinds, "turned.png"):
        assert (pixels[name] - torch.tensor(ramp).int()).abs().max() <= 4, name
    assert set(pixels["bits.png"].unique().tolist()) == {0, 255}
    done = cli("--dataset folder --data-path own --epochs 1", NARROW, "--batch-size 5")
    assert done.code == 0 and "own: 10 + 10 images" in done.out


@pytest.fixture
def copy(place, pictures):
    return Path(shutil.copytree(pictures, place / "copy"))


COPY = FOLDER.replace("--train-images 32 --test-images 10", "") + " --data-path copy"


def test_unreadable_images_stop_or_are_skipped_with_a_report(copy, cli):
    (copy / "train/ant/3.png").write_bytes(b"no image")
    (copy / "train/bee/4.png").write_bytes((copy / "train/bee/4.png").read_bytes()[:300])
    done = cli(COPY)
    assert_one_line(done, "2 of 36 images", "train/ant/3.png", "train/bee/4.png", "skip")
    done = cli(COPY, "--unreadable skip")
    assert done.code == 0 and "skipped: 2 of 36 images" in done.out
    assert "copy: 34 + 15 images" in done.out


def test_folder_layouts_that_cannot_work(copy, cli):
    (copy / "test/dog").mkdir()
    shutil.copy(copy / "test/ant/0.png", copy / "test/dog")
    assert_one_line(cli(COPY), "test has classes that training has not: dog")
    shutil.rmtree(copy / "test/dog")
    for path in (copy / "train/cat").iterdir():
        path.unlink()
    assert_one_line(cli(COPY), "no images in cat")
    shutil.rmtree(copy / "train")
    assert_one_line(cli(COPY), "copy/train", "train/CLASS/*.jpg")
    (copy / "train").mkdir()
    assert_one_line(cli(COPY), "no class folders")
    assert_one_line(cli(FOLDER, "--data-path nowhere"), "nowhere/train")
    assert_one_line(cli(FOLDER.replace("32", "99")), "--train-images 99", "only 36")


def imagenet_tree(root, boxes=True):
    random = np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(n):
                file = folder / f"{name}_{split}_{k}.JPEG"
                Image.fromarray(random.integers(0, 60, (80, 100, 3), dtype=np.uint8)).save(file)
    image = np.zeros((80, 100, 3), np.uint8)
    image[20:60, 10:50] = 255                             # the object, in its box
    Image.fromarray(image).save(root / "train/n02/n02_train_0.JPEG", quality=95)
    notes = root / "Annotations/n02"
    notes.mkdir(parents=True)
    box = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>" \
        "</object>"
    (notes / "n02_train_0.xml").write_text(
        f"<annotation>{box.format(15, 25, 45, 55)}{box.format(60, 20, 90, 50)}</annotation>")


H_IMAGENET = f"--dataset h-imagenet --data-path own --image-size 32 --epochs 1 {NARROW} " \
    "--batch-size 4 --class-list list.txt"


def test_h_imagenet_cuts_boxes_caches_and_checks(cli):
    imagenet_tree(Path("own"))
    Path("list.txt").write_text("n02\nn03\n")
    done = cli(H_IMAGENET)
    assert done.code == 0 and "9 train images of 2 classes" in done.out and "255,725" in done.out
    data = load(dataset="h-imagenet", data_path="own", image_size=32, class_list="list.txt")
    bright = data.train.images.float().mean((1, 2, 3))
    assert data.classes == ["n02", "n03"] and data.train.labels.tolist() == 5 * [0] + 4 * [1]
    assert bright[0] > 250 and bright[1] < 5              # the two boxes of the first image
    done = cli(H_IMAGENET, "--seed 1")
    assert done.code == 0 and "decoding" not in done.out  # the cache is used
    for cache in Path("own/h-imagenet-cache").glob("*.bin"):
        content = bytearray(cache.read_bytes())
        content[100] ^= 1
        cache.write_bytes(content)
    train.read_data.cache_clear()
    assert_one_line(cli(H_IMAGENET, "--seed 2"), "checksum", "delete it")
    Path("list.txt").write_text("n02\nn77\n")
    assert_one_line(cli(H_IMAGENET), "n77")
    (Path("own") / "Annotations/n02/n02_train_0.xml").write_text("<annotation><object>")
    assert_one_line(cli(H_IMAGENET), "n02_train_0.xml is damaged")
    assert_one_line(cli(H_IMAGENET.replace("list.txt", "none.txt")), "none.txt")
    assert_one_line(cli(H_IMAGENET.replace("--class-list list.txt", "")), "--class-list FILE")


def test_imagenet_is_a_tree_too(cli):
    imagenet_tree(Path("own"))
    done = cli(f"--dataset imagenet --data-path own --image-size 32 --epochs 1 {NARROW} "
               "--batch-size 4 --augment ++")
    assert done.code == 0 and "imagenet: 12 + 6 images, 3 classes" in done.out, done


# ------------------------------------------------------------------------------------------------
# Augmentation   [App. C]
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_torchvisions_image_by_image(channels, flip):
    images = torch.randint(256, (40, channels, 34, 34), dtype=torch.uint8)
    images[0] = images[1, :, :1, :1]                      # a uniform image, and a grey one
    images[2] = images[2, :1]
    draws = torch.rand(40, 7)
    draws[3], draws[4] = 0, 1 - 2**-24
    ours = train.augmented(images, draws, 32, "++", flip)
    plain = train.augmented(images, draws, 32, "+", flip)
    for image, draw, jittered, cropped in zip(images, draws.tolist(), ours, plain, strict=True):
        x = T.crop(image, int(draw[0] * 3), int(draw[1] * 3), 32, 32)
        x = T.to_dtype(T.horizontal_flip(x) if flip and draw[2] < 0.5 else x, scale=True)
        torch.testing.assert_close(cropped, x)
        brightness, contrast, saturation, hue = (0.2 * (2 * d - 1) for d in draw[3:])
        x = T.adjust_contrast(T.adjust_brightness(x, 1 + brightness), 1 + contrast)
        if channels == 3:
            x = T.adjust_hue(T.adjust_saturation(x, 1 + saturation), hue)
        torch.testing.assert_close(jittered, x, rtol=0, atol=2e-5)
    centre = train.augmented(images, draws, 32, "none", False)
    torch.testing.assert_close(centre, images[..., 1:33, 1:33] / 255)


def test_draws_depend_on_seed_epoch_and_index_alone():
    order, draws = train.shuffle(50, 3, 7)
    assert sorted(order.tolist()) == list(range(50)) and draws.min() >= 0 and draws.max() < 1
    torch.manual_seed(1)
    for a, b in zip((order, draws), train.shuffle(50, 3, 7), strict=True):
        assert torch.equal(a, b)
    for other in (train.shuffle(50, 3, 8), train.shuffle(50, 4, 7)):
        assert not torch.equal(other[0], order) and not torch.equal(other[1], draws)


def test_views_of_a_test_image():
    images = torch.arange(36).view(1, 1, 6, 6).byte()
    def corners(*w):
        return [round(float(v[0, 0, 0, 0]) * 255) for v in train.test_views(images, 4, *w)]
    assert corners(False, True) == [7]
    assert corners(True, False) == [7, 0, 2, 12, 14]
    assert corners(True, True) == [7, 10, 0, 3, 2, 5, 12, 15, 14, 17]


# ------------------------------------------------------------------------------------------------
# Command line and Config
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """A finished run of the folder; copy nothing, change nothing."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(pictures)
    assert run(folder, FOLDER, "--epochs 2 --output-dir run").code == 0
    return folder / "run"


def test_the_default_run_in_small(cli, place):
    done = cli("--train-images 64 --test-images 20 --set types=2 --epochs 2")
    folder = place / "runs/digits-encapnet-small-0"
    lines = [line for line in done.out.splitlines() if line.startswith("epoch")]
    assert done.code == 0 and not done.err and len(lines) == 2
    assert re.fullmatch(r"epoch +1/2  loss \d.\d+  feedback \d.\d+  error: train .* %  test .* %  "
                        r"\d+ images/s  \dm\d\ds left", lines[0])
    header, *epochs = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert header["config"]["dataset"] == "digits" and header["environment"]["torch"]
    assert [e["epoch"] for e in epochs] == [1, 2]
    with Image.open(folder / "curves.png") as image:
        assert image.width > 500
    line, = map(json.loads, (place / "runs/results.jsonl").read_text().splitlines())
    assert line == json.loads((folder / "result.json").read_text())
    assert line["error"] == epochs[-1]["test_error"] and line["images"] == 20
    assert line["outcome"] in ("ok", "at chance")
    assert f"test error {line['error']:.2f} %" in done.out
    assert cli("--train-images 64 --test-images 20 --set types=2 --epochs 0").code == 0
    assert (place / "runs/digits-encapnet-small-1").is_dir()


def test_help_and_list(cli, capsys):
    with pytest.raises(SystemExit) as stop:
        cli("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("--milestones", "default: 200 300 400", "[Sec. 5]", "default: 128", "--table"):
        assert part in text, part
    done = cli("--list")
    for name in (*encapnet.MODELS, *train.DATASETS, "--table 5", "--figure 4", "resnet101"):
        assert name in done.out, name


@pytest.mark.parametrize("words, wanted", [
    ("--modle encapnet", "did you mean --model?"),
    ("--model encapnet7", "did you mean encapnet"), ("--dataset cifar", "did you mean cifar10"),
    ("--epochs -1", "at least 0"), ("--lr nan", "--lr"), ("--lr x", "must be a number"),
    ("--batch-size 0", "at least 1"), ("--batch-size 1.5", "whole number"),
    ("--set types", "KEY=VALUE"), ("--table 9", "--table"), ("--loss hinge", "margin, spread"),
    ("--device tpu9", "--device"), ("--set tipes=2 --train-images 9", "types"),
    ("--set types=0 --train-images 9", "types"), ("--model resnet18 --loss margin", "logits"),
    ("--resume nowhere", "nowhere"), ("--resume", "no unfinished run"),
    ("--test-only", "no run"), ("--predict x.png --resume nowhere", "nowhere"),
    ("--table 3 --row nothing", "no such row"), ("--table 3 --model encapnet", "--model"),
    ("--report", "README.md"), ("extra", "extra"), ("--milestones 0", "at least 1"),
])
def test_a_mistake_is_one_line(words, wanted, cli):
    assert_one_line(cli(words), wanted)


def test_debug_shows_the_traceback(cli):
    assert "Traceback" in cli("--resume nowhere --debug").err


def test_recipes():
    """The paper's settings; digits' own; epochs scale milestones; ++ is longer; fast is another."""
    paper = train.make_config(dataset="cifar10")
    assert (paper.lr, paper.weight_decay, paper.batch_size, paper.epochs, paper.milestones,
            paper.lam, paper.optimizer, paper.loss, paper.augment, paper.flip, paper.model) == (
        1e-4, 5e-4, 128, 600, (200, 300, 400), 10, "adam", "margin", "none", False, "encapnet")
    assert train.make_config(dataset="cifar10", epochs=6).milestones == (2, 3, 4)
    longer = train.make_config(dataset="cifar10", augment="++")
    assert (longer.epochs, longer.milestones, longer.flip) == (900, (300, 450, 600), True)
    assert not train.make_config(dataset="svhn", augment="++").flip
    assert train.make_config(dataset="svhn", augment="++", flip=True).flip
    assert train.make_config(dataset="h-imagenet").batch_size == 256
    assert train.make_config(dataset="h-imagenet").image_size == 128
    assert train.make_config(dataset="h-imagenet", model="encapnet-v3").image_size == 224
    assert train.make_config(model="resnet18").loss == "ce"
    digits, fast = train.make_config(), train.make_config(dataset="svhn", recipe="fast")
    assert digits.model == "encapnet-small" and digits.epochs < 10
    assert fast.schedule == "one-cycle" and fast.epochs < 100 and fast.recipe == "fast"
    assert train.config_key(fast) != train.config_key(train.make_config(dataset="svhn"))


def test_a_key_names_a_result_whatever_the_seed_and_place():
    one = train.make_config(dataset="svhn", output_dir="a", seed=1, workers=0)
    two = train.make_config(dataset="svhn", output_dir="b", seed=2, workers=3)
    assert train.config_key(one) == train.config_key(two)
    for change in (dict(lr=1e-3), dict(set={"types": 8}), dict(epochs=9), dict(augment="+")):
        other = train.make_config(dataset="svhn", **change)
        assert train.config_key(other) != train.config_key(one)


@pytest.mark.parametrize("schedule, rates", [
    ("steps", {0: 1, 199: 1, 200: .1, 300: .01, 400: .001, 599: .001}),
    ("one-cycle", {0: .04, 120: 1, 360: .5, 600: .001})])
def test_learning_rate(schedule, rates):
    config = train.make_config(dataset="cifar10", schedule=schedule, lr=1.)
    for epoch, rate in rates.items():
        assert train.learning_rate(config, epoch, epoch / 600) == pytest.approx(rate)


# ------------------------------------------------------------------------------------------------
# A trained network
# ------------------------------------------------------------------------------------------------


def test_test_only_repeats_the_result(trained, cli):
    error = json.loads((trained / "result.json").read_text())["error"]
    done = cli(f"--resume {trained} --test-only")
    assert done.code == 0 and f"test error {error:.2f} %" in done.out and "10 images" in done.out
    assert_one_line(cli(f"--resume {trained} --test-only --dataset digits --test-images 20 "
                        "--train-images 64"), "other classes")


def test_predict(trained, cli, pictures):
    image = pictures / "test/bee/1.png"
    Image.open(image).convert("RGBA").save("clear.png")
    done = cli(f"--resume {trained} --predict {image} clear.png")
    first, second = done.out.split("clear.png")
    lengths = [float(x) for x in re.findall(r"(?:ant|bee|cat) (\d\.\d+)", first)]
    assert done.code == 0 and len(lengths) == 3 and lengths == sorted(lengths, reverse=True)
    assert 0 <= lengths[-1] and lengths[0] <= 1
    assert lengths == [float(x) for x in re.findall(r"(?:ant|bee|cat) (\d\.\d+)", second)]
    Path("text.png").write_text("no image")
    Path("folder.png").mkdir()
    Image.new("1", (10001, 10000)).save("huge.png")
    for name in ("text.png", "folder.png", "huge.png", "missing.png"):
        assert_one_line(cli(f"--resume {trained} --predict {name}"), f"cannot read {name}")


def test_weights_of_wrapped_models_are_interchangeable(trained, cli):
    def answer(path):
        return cli(f"--resume {path} --test-only").out.splitlines()[-1]
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."):
        state = state_of(trained)
        state["net"] = {prefix + name: t for name, t in state["net"].items()}
        torch.save(state, f"{prefix}pt")
        assert answer(f"{prefix}pt") == answer(trained), prefix
    state["net"].popitem()
    torch.save(state, "less.pt")
    assert_one_line(cli("--resume less.pt --test-only"), "does not fit")


@pytest.mark.slow
def test_a_compiled_run_and_a_plain_one_continue_each_other(cli, place):
    words = FOLDER + " --save-every 0 --set feedback=0"
    assert cli(words, "--compile --output-dir run").code == 0
    assert cli("--resume run --no-compile --epochs 2").code == 0
    assert cli("--resume run --compile --epochs 3").code == 0


# ------------------------------------------------------------------------------------------------
# Tables, figures, report, bench in miniature
# ------------------------------------------------------------------------------------------------

MINIATURE = "--dataset folder --epochs 1 --train-images 8 --test-images 6 --batch-size 4"


@pytest.fixture
def quick(monkeypatch):
    """No picture of each run; no second in which to time; Table 1's processes are this one."""
    monkeypatch.setattr(train, "draw_run", lambda run: None)
    monkeypatch.setattr(bench, "bench_step", functools.partial(bench.bench_step, seconds=0))
    true = subprocess.run

    def started(command, *arguments, **keywords):
        if "--bench" not in command:
            return true(command, *arguments, **keywords)
        return subprocess.CompletedProcess(command, train.main(command[2:]))
    monkeypatch.setattr(subprocess, "run", started)


def numbers(text, row):
    """The cells of a Markdown row."""
    return [c.strip() for line in text.splitlines() if line.startswith(f"| {row}")
            for c in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize("number, words, ran, dashed", [
    (3, "--set types=4 --row baseline KL", "(b) KL loss", "(8) two OTs"),
    (4, "--set types=2 --row ++", "EncapNet++", "EncapNet+ "),
    (5, "--set types=2 --row learnable 4 spread", "learnable", "CE loss"),
])
def test_a_table_runs_and_stands_beside_the_papers(number, words, ran, dashed, cli, quick):
    table = f"--table {number} {MINIATURE} {words}"
    done = cli(table)
    assert done.code == 0, done
    text = done.out[done.out.index("**Table"):]
    cells = numbers(text, ran)
    assert re.fullmatch(r"\d+\.\d\d", cells[0]) and re.search(r"\d|fail", cells[1]), cells
    assert "1 seed, 1 epochs, CPU" in cells[-1] and numbers(text, dashed)[1] == "–"
    assert cells[2] == "–"                                             # digits, not the paper's
    again = cli(table)
    assert again.code == 0 and "---" not in again.out.split("**Table")[0]     # nothing run twice
    assert again.out[again.out.index("**Table"):] == text
    assert Path(f"runs/table-{number}.md").read_text().strip() == text.strip()
    if number == 4:
        assert "quoted" in numbers(text, "DSN")[-1]


USUAL = dict(coefficients="both", skips="I II", aide=3, squashed=False, units=0, divergence="ot",
             bias_fix=True, plan_grad=False, extractor=True, generator="capsule", cost="cosine",
             lam=10.0)
BARE, UNIT = dict(skips=""), dict(units=1)
TABLE_3 = {    # what tells a row from EncapNet with both skips and no unit
    "(1)": dict(BARE, coefficients=None, aide=None), "(2)": dict(BARE, coefficients="own"),
    "(3)": dict(BARE, coefficients="cross"), "(4)": BARE, "(5)": dict(skips="I"),
    "(6)": dict(skips="II"), "(7)": {}, "(8)": dict(units=2), "(a)": {},
    "(b)": dict(UNIT, divergence="kl"), "(c)": UNIT, "(d1)": dict(UNIT, bias_fix=False),
    "(d2)": dict(UNIT, plan_grad=True), "(d3)": dict(UNIT, extractor=False),
    "(d4)": dict(UNIT, generator="vanilla"), "(d5)": dict(UNIT, cost="l2"),
    "aide kernel 1": dict(aide=1), "aide kernel 5": dict(aide=5), "aide kernel 7": dict(aide=7),
    "squash in each branch": dict(squashed=True), "OT loss, lambda 0.1": dict(UNIT, lam=0.1),
    "OT loss, lambda 1": dict(UNIT, lam=1.0), "OT loss, lambda 10": dict(UNIT, lam=10.0)}


def ablations_of(config):
    """What is built, in the words of USUAL."""
    net = train.make_model(config, 10, 3)
    module, layers = net.blocks[0], [m for m in net.modules() if isinstance(m, encapnet.CapConv)]
    found = {(m.coefficients, m.coefficients and m.aide.weight.shape[-1],
              m.branch_norms is not None) for m in layers}
    (coefficients, aide, squashed), = found                            # every layer is alike
    skips = " ".join(["I"] * (module.reduce.skip is not None) + ["II"] * module.skip)
    built = dict(coefficients=coefficients, aide=aide, squashed=squashed, skips=skips,
                 units=len(net.units) // len(net.blocks), lam=config.lam)
    for unit in net.units:
        built |= dict(divergence=unit.kind, bias_fix=unit.bias_fix, cost=unit.cost,
                      plan_grad=unit.sinkhorn["plan_grad"], extractor=unit.extractor is not None,
                      generator="capsule" if unit.types else "vanilla")
    return built


def test_rows_of_table_3_build_what_they_are_called():
    small = {"set": dict(types=2, depths=(2, 1), dims=(1, 2, 2))}
    cells = [cell for part in train.TABLES[3] for cell in train.part_cells(part, small)
             if cell[1] == "EncapNet"]
    assert len(cells) == len(TABLE_3)
    for row, _, config in cells:
        changed, = (changes for name, changes in TABLE_3.items()
                    if row == name or row.startswith(f"{name} "))
        assert ablations_of(config).items() <= (USUAL | changed).items(), row


def test_rows_of_tables_1_and_5_are_what_they_are_called():
    part, = train.TABLES[1]
    models = [(row[:3], config.model, config.dataset)
              for row, _, config in train.part_cells(part, {})]
    names = ["capnet-dynamic", "capnet-em", "cnn-same", "cnn-similar", "encapnet6-master",
             "encapnet6"]
    assert sorted(models) == sorted((f"({letter})", name, data) for letter, name in
                                    zip("abcdef", names, strict=True)
                                    for data in ("cifar10", "mnist"))
    iterations, starts, losses = (list(train.part_cells(part, {})) for part in train.TABLES[5])
    assert all(train.make_model(config, 10, 3).routed[0].iterations == int(row)
               for row, _, config in iterations) and len(iterations) == 4
    assert [config.set["b_init"] for _, _, config in starts] == [row for row, *_ in starts]
    called = {"spread, fix m": "spread-fixed", "spread": "spread", "margin": "margin",
              "CE loss": "ce"}
    assert all((called[row], column.lower()) == (config.loss, config.optimizer)
               for row, column, config in losses) and len(losses) == 12


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_a_whole_table_in_miniature(number, cli, quick):
    done = cli(f"--table {number} {MINIATURE} --set types=4")
    assert done.code == 0, done
    for block in done.out[done.out.index("**Table"):].split("**Table")[2 if number == 1 else 1:]:
        for line in block.splitlines():
            if line.startswith("| ") and "---" not in line and "paper" not in line:
                assert "seed" in line or "quoted" in line, line


def test_table_1_measures_cost(cli, quick):
    words = MINIATURE.replace("--epochs 1", "--epochs 10 --lr 3e-3 --train-images 30")
    text = cli(f"--table 1 {words} --set types=2 --row '(c)' --seeds 2").out
    cost = numbers(text, "(c) vanilla CNN, same shape")
    assert cost[0] == "128" and float(cost[2]) < 24.44 and "CPU" in cost[8], cost
    assert "±" in text and "2 seeds" in text
    lines = map(json.loads, Path("runs/results.jsonl").read_text().splitlines())
    benches = [line["bench"] for line in lines if "bench" in line]
    assert [b["batch"] for b in benches] == [128]


def test_costs_of_another_device_are_measured_again(cli, quick, monkeypatch):
    config = train.row_config(train.CIFAR10, train.use("cnn-same", width=1 / 16))
    line = {**train.cost_key(config), "batch": 128, "device": "H100"}
    Path("runs").mkdir(exist_ok=True)
    Path("runs/results.jsonl").write_text(json.dumps({"bench": line}) + "\n")
    train.measure_costs({"set": {"types": 2}, "device": "cpu"}, ["(c)"])
    train.measure_costs({"set": {"types": 2}, "device": "cpu"}, ["(c)"])
    lines = list(train.read_lines(Path("runs/results.jsonl")))
    assert [entry["bench"]["device"][:3] for entry in lines] == ["H10", "CPU"]


def test_table_2_is_the_built_network(cli):
    done = cli("--table 2")
    assert done.code == 0 and done.out.count("as the paper's") == 2
    assert "| stem" in done.out and "512 x 4 x 4" in done.out


def test_failing_rows_are_reported_and_the_others_go_on(cli, quick):
    words = f"--table 3 {MINIATURE} --set width=broad --set types=2 --row '(b) KL'"
    done = cli(words)
    assert_one_line(done, "1 runs failed", "ResNet", "width", code=1)
    cells = numbers(done.out, "(b) KL loss")
    assert "1 seed" in cells[-1] and cells[4] == "–"


def test_a_tables_set_reaches_the_networks_that_have_it():
    given = dict(set={"types": 8, "depths": (1,), "blocks": (1, 2), "tipes": 3})
    narrow = {name: train.row_config(dict(model=name), given).set
              for name in ("encapnet", "resnet18", "cnn-similar")}
    assert narrow == {"encapnet": {"types": 8, "depths": (1,), "tipes": 3},
                      "resnet18": {"width": 0.25, "blocks": (1, 2), "tipes": 3},
                      "cnn-similar": {"width": 2.375 / 4, "tipes": 3}}


@pytest.mark.parametrize("number", [2, 4])
def test_figures(number, cli, quick, monkeypatch):
    figures, draw = [], train.save_figure
    monkeypatch.setattr(train, "save_figure", lambda figure, path: figures.append(figure) or
                        draw(figure, path))
    done = cli(f"--figure {number} {MINIATURE} --set types=4 --output-dir drawn")
    assert done.code == 0, done
    with Image.open(f"drawn/figure-{number}.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors()) > 10
    lines = [list(line.get_ydata()) for axis in figures[-1].axes for line in axis.lines]
    runs = list(map(json.loads, Path("runs/results.jsonl").read_text().splitlines()))
    if number == 4:
        recorded = sorted(r["curves"]["loss"] for r in runs)
        assert len(lines) == 4 and sorted(lines) == [pytest.approx(line) for line in recorded]
        return
    moments = [m for r in runs for m in r["moments"]]
    assert [m["epoch"] for m in moments] == [0, 1] * 2
    assert all(sum(m["percent"]) == pytest.approx(100) for m in moments)
    drawn = [[length for length in line if length == length] for line in lines]     # but the nan
    assert drawn == [[length for length, percent in zip(m["length"], m["percent"], strict=True)
                      if percent] for m in moments]


def test_a_figure_without_runs_says_why(cli, quick, monkeypatch):
    def diverge(config):
        raise train.Diverged("NaN at step 1; stopped")
    monkeypatch.setattr(train, "fit", diverge)
    assert_one_line(cli(f"--figure 4 {MINIATURE}"), "nothing to draw", "NaN at step 1", code=1)


def test_every_column_tells_its_own_seeds_and_devices():
    result = dict(error=10.0, epochs=600, outcome="ok")
    runs = {}
    for (*_, config), devices in zip(list(train.part_cells(train.TABLES[1][0], {}))[:2],
                                     (["H100"] * 2, ["CPU"]), strict=True):
        for seed, device in enumerate(devices):
            runs[train.config_key(config), seed] = {**result, "environment": {"device": device}}
    text = train.render_part(1, train.TABLES[1][0], {}, runs)
    assert "| 14.28 | 10.00 ± 0.00 | -4.28 | 0.37 | 10.00 | +9.63 |" in text
    assert "| CIFAR-10: 2 seeds, 600 epochs, H100; MNIST: 1 seed, 600 epochs, CPU |" in text


def test_costs_are_of_the_same_settings_and_device():
    config = train.row_config(train.CIFAR10, train.use("cnn-same"))
    line = {**train.cost_key(config), "batch": 128, "parameters": 10 ** 6, "memory_MB": 100.,
            "step_seconds": 1., "device": "H100"}
    others = [{**line, "amp": True, "memory_MB": 1.}, {**line, "image_size": 64, "memory_MB": 2.},
              {**line, "batch": 4096, "device": "CPU", "memory_MB": 777.}]
    text = train.render_costs(train.TABLES[1][0], {}, [line, *others])
    cells = numbers(text, "(c) vanilla CNN, same shape")
    assert cells[4:6] == ["100", "100 (128)"] and cells[-1] == "H100"


def test_flags_are_read_back():
    config = train.make_config(dataset="mnist", model="encapnet6", set={"types": 4}, lr=3e-3,
                               milestones=(1, 2), channels_last=True, amp=False)
    fields = {**train.identity_fields(config), "amp": False, "channels_last": True}
    fields.pop("class_list")                                           # empty: not to be given
    commands, given = train.parse(train.flags(fields))
    assert not commands and train.make_config(**given) == config


def test_a_torn_line_costs_no_other(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    results = Path("runs/results.jsonl")
    train.record({"n": 1})
    results.write_text(results.read_text() + '{"n": 2, "to')
    train.record({"n": 3})
    assert list(train.read_lines(results)) == [{"n": 1}, {"n": 3}]
    assert "line 2: torn" in capsys.readouterr().out


def test_only_problems_choose_the_exit_code(capsys):
    def fail(words):
        raise urllib.error.HTTPError("http://x", 404, "gone", {}, None)
    assert train.guarded("x.py", fail, []) == 1
    assert "unexpected HTTPError" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    ("--check", "--check"), ("--row x", "--row"), ("--seeds 3", "--seeds"),
    ("--table 3 --figure 4", "one at a time"), ("--figure 2 --seeds 2", "--seeds"),
    ("--bench network --model encapnet6 --amp", "--amp, --model"), ("--list --seeds 2", "--seeds")])
def test_flags_without_effect_are_refused(words, told, cli):
    assert_one_line(cli(words), told)


def test_report_renders_and_checks(cli, quick):
    assert cli(f"--table 5 {MINIATURE} --set types=2 --row 4").code == 0
    words = f"5 {MINIATURE} --set types=2"
    Path("README.md").write_text(f"before\n<!-- table {words} -->\nstale\n<!-- end -->\nafter\n"
                                 "<!-- runs -->\n<!-- end -->\n<!-- speed -->\n<!-- end -->\n")
    assert_one_line(cli("--report --check"), "does not agree", code=1)
    bench.compare("squash", (0.002, None), {"loops": (0.005, 3e6)}, torch.device("cpu"))
    bench.compare("squash", (0.002, 2e6), {"loops": (0.006, 3e6)}, torch.device("cpu"))
    Path("results").mkdir()
    shutil.copy("runs/results.jsonl", "results/all.jsonl")
    assert cli("--report").code == 0 and cli("--report --check").code == 0
    text = Path("README.md").read_text()
    assert text.startswith("before") and "after" in text and "stale" not in text
    assert "1 seed" in numbers(text, "4")[-1] and f"--table {words}" in text
    assert numbers(text, "squash") == [*"loops 2.0 6.0 3.00 2 3 1.50".split(), "CPU, 1 thread"]
    Path("README.md").write_text(text.replace("14.25", "14.26"))
    assert_one_line(cli("--report --check"), "does not agree", code=1)


def test_bench(cli, quick):
    done = cli("--bench --model capnet-em --set types=2 --batch-size 2")
    assert done.code == 0
    for part in ("images/s", "forward", "backward", "optimizer", "data", "peak memory"):
        assert part in done.out
    line = json.loads(Path("runs/results.jsonl").read_text())["bench"]
    parts = [line[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer")]
    assert min(parts) > 0 and sum(parts) < 10 * line["train_step_seconds"] < 100 * sum(parts)


# ------------------------------------------------------------------------------------------------
# Fuzz: no traceback ever reaches a user
# ------------------------------------------------------------------------------------------------

FLAGS = [f for a in train.make_parser()._actions for f in a.option_strings
         if f not in ("-h", "--help", "--debug")]
WORDS = st.one_of(
    st.sampled_from(FLAGS), st.sampled_from([*train.DATASETS, *encapnet.MODELS, *train.AUGMENT]),
    st.sampled_from(["types=2", "types=x", "=", "depths=(", "a=" + "[" * 99, "cpu", "cuda:7", "",
                     "-", "--", "-1", "0", "1", "2", "1e99", "nan", "inf", "fast", "margin", "ce"]),
    st.text(max_size=5).filter(lambda text: "\0" not in text))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=6))
@example(["--set", "types=" + "9" * 5000])
@example(["--resume", "\0"])
@example(["\n"])
@example(["--model", "a\nb"])
def test_no_command_line_shows_a_traceback(cli, monkeypatch, words):
    def nothing(config):
        raise train.Problem("ran")
    monkeypatch.setattr(train, "fit", nothing)
    monkeypatch.setattr(bench, "run_bench", lambda name, config: nothing(config))
    done = cli(*map(shlex.quote, words))
    assert done.code in (0, 1, 2) and "Traceback" not in done.err, (words, done)
    assert "unexpected" not in done.err and done.err.count("\n") == (done.code > 0), (words, done)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_checkpoint_shows_a_traceback_or_loads_changed(trained, cli, data):
    """Bytes changed, cut, inserted: refused in one line, or every value is as it was."""
    content = bytearray((trained / "last.pt").read_bytes())
    k = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if how == "flip":
        content[k] ^= data.draw(st.integers(1, 255))
    else:
        content[k:] = b"" if how == "cut" else b"PK" + content[k:]
    Path("fuzz.pt").write_bytes(content)
    try:
        state = train.load_checkpoint("fuzz.pt")
    except train.Problem as problem:
        assert "fuzz.pt" in str(problem) and "\n" not in str(problem)
        return
    for x, y in zip(flat(state), flat(state_of(trained)), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


PLAIN = st.recursive(st.none() | st.integers(-3, 3) | st.text(max_size=3) | st.just(torch.ones(2)),
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
                         st.text(max_size=3), inner, max_size=2), max_leaves=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_checkpoint_with_a_strange_value_is_one_line(trained, cli, data):
    """Any part replaced by any plain value: what needs it says so, or does without."""
    state = state_of(trained)
    key = data.draw(st.sampled_from([*state]))
    if isinstance(state[key], dict) and data.draw(st.booleans()):
        state[key][data.draw(st.sampled_from([*state[key]]))] = data.draw(PLAIN)
    else:
        state[key] = data.draw(PLAIN)
    torch.save(state, "strange.pt")
    done = cli("--resume strange.pt --test-only")
    assert done.code in (0, 1, 2) and "Traceback" not in done.err, done
    assert done.err.count("\n") == (done.code > 0), done


# ------------------------------------------------------------------------------------------------
# Printed digits
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sheet():
    return draw_digits(200, True, 0)


def moments(ink):
    """ink (b, h, w) -> mass (b,), x and y of the centroid in pixels from the image's centre"""
    h, w = ink.shape[-2:]
    mass = ink.sum((1, 2))
    x = (ink.sum(1) * (torch.arange(w) - (w - 1) / 2)).sum(1) / mass
    y = (ink.sum(2) * (torch.arange(h) - (h - 1) / 2)).sum(1) / mass
    return mass, x, y


def posed(glyphs, x=0., y=0., rotation=0., scale=0., shear=0.):
    pose = torch.tensor([[x, y, rotation, scale, shear]])
    return pose_glyphs(glyphs, pose.repeat(len(glyphs), 1))


def blob(u, v):
    """A dot u heights right of the middle and v below it."""
    at = (torch.arange(CELL) - (CELL - 1) / 2) / GLYPH
    return torch.exp(-((at - u)**2 + (at[:, None] - v)**2) / .003).unsqueeze(0)


@pytest.mark.parametrize("split", [True, False])
def test_digits_shapes_ranges_balance(split):
    images, labels, poses = draw_digits(1000, split, 3)
    assert images.shape == (1000, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == 10 * [100]
    assert poses.shape == (1000, len(POSE)) and poses.dtype == torch.float32
    for column, (low, high) in zip(poses.T, POSE.values(), strict=True):
        assert low <= column.min() < low + .1 * (high - low)
        assert high >= column.max() > high - .1 * (high - low)
    assert images.float().std((1, 2, 3)).min() > 5                # no image is blank
    assert [len(part) for part in draw_digits(0, split)] == [0, 0, 0]


def test_digits_depend_on_seed_split_and_index_alone(sheet):
    for again in (draw_digits(200, True, 0), draw_digits(130, True, 0)):
        for a, b in zip(sheet, again, strict=True):
            assert torch.equal(a[:len(b)], b)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    others = [draw_digits(200, *other) for other in ((True, 1), (False, 0), (True, 2**32))]
    assert torch.equal(torch.get_rng_state(), before)             # the global one is left alone
    for other in others:
        assert (other[0] != sheet[0]).flatten(1).any(1).all()
        assert .05 < (other[1] == sheet[1]).float().mean() < .15  # labels are drawn anew as well
    chunks = torch.stack(sheet[2].split(100))
    assert len(chunks.unique(dim=0)) == len(chunks)               # no chunk repeats another


def test_typefaces_are_disjoint_designs_and_true_ones():
    train, test = TYPEFACES["train"], TYPEFACES["test"]
    assert len(set(train)) == 16 and len(set(test)) == 6 and not set(train) & set(test)

    def families(names):
        fonts = [FT2Font(f"{get_data_path()}/fonts/ttf/{name}.ttf") for name in names]
        return {font.family_name.split()[0] for font in fonts}
    assert not families(train) & families(test)


def test_every_typeface_draws_ten_distinct_digits_of_one_height():
    glyphs, widths = rasterise(TYPEFACES["train"] + TYPEFACES["test"])
    assert glyphs.shape == (22, 10, CELL, CELL) and 0 <= glyphs.min() and glyphs.max() == 1
    rows, columns = glyphs.amax(3), glyphs.amax(2)
    assert ((rows.sum(2) - GLYPH).abs() < 1.5).all()
    assert ((columns.sum(2) - GLYPH * widths).abs() < 2.5).all()
    middle = torch.arange(CELL) - (CELL - 1) / 2
    for profile in (rows, columns):                               # the box sits in the middle
        assert ((profile > 0) * middle).sum(2).abs().max() / GLYPH < 1
    flat = F.normalize(glyphs.flatten(2) - glyphs.flatten(2).mean(2, keepdim=True), dim=2)
    alike = flat @ flat.transpose(1, 2) - 2 * torch.eye(10)       # (f, 10, 10), own digit left out
    assert alike.max() < .9
    # The nine other digits of a typeface are less like a digit than the same digit elsewhere.
    flat = F.normalize(F.avg_pool2d(glyphs, 4).flatten(2) - glyphs.mean((2, 3))[..., None], dim=2)
    alike = torch.einsum("fdp,gep->fdge", flat, flat)
    for f in range(22):
        alike[f, :, f] = -1
    nearest = alike.amax(2).argmax(2)                             # (f, 10) digit of the best match
    assert (nearest == torch.arange(10)).float().mean() > .97


@pytest.mark.parametrize("pose, u, v, x, y", [
    (dict(x=2., y=-1.), 0, 0, 2, -1),
    (dict(rotation=90.), .2, 0, 0, -4),          # counter-clockwise: from the right to the top
    (dict(rotation=30.), .3, 0, 5.196, -3),
    (dict(scale=-1.), .4, -.4, 4, -4),           # 10 pixels high instead of 20
    (dict(shear=.25), 0, -.4, 2, -8),            # the top leans to the right
    (dict(shear=.25), 0, .4, -2, 8),
    (dict(shear=.25), .3, 0, 6, 0),
    (dict(rotation=90., shear=.5), 0, -.4, -8, -4),  # sheared first, then turned, then moved
    (dict(rotation=90., x=3., y=1.), .2, 0, 3, -3),
])
def test_a_pose_moves_a_dot_as_stated(pose, u, v, x, y):
    _, cx, cy = moments(posed(blob(u, v), **pose))
    assert cx.item() == pytest.approx(x, abs=.1) and cy.item() == pytest.approx(y, abs=.1)


def test_glyphs_posed_keep_their_moments():
    glyphs = rasterise(["DejaVuSans"])[0][0]                      # (10, CELL, CELL)
    mass, x, y = moments(posed(glyphs))
    for rotation, sign in ((0., 1), (180., -1)):
        same, mx, my = moments(posed(glyphs, x=2.5, y=-3., rotation=rotation))
        assert torch.allclose(mx, sign * x + 2.5, atol=.05)
        assert torch.allclose(my, sign * y - 3, atol=.05)
        assert torch.allclose(same, mass, rtol=.02)
    assert torch.allclose(moments(posed(glyphs, scale=-.5))[0], mass / 2, rtol=.03)
    assert torch.allclose(moments(posed(glyphs, shear=.3))[0], mass, rtol=.02)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("overlap", [False, True])
def test_poses_and_labels_describe_the_images(split, overlap):
    """A template of the label in its pose explains the image; in any other pose it does not."""
    images, labels, poses = draw_digits(200, split, 4, overlap)
    glyphs, _ = rasterise(TYPEFACES["train" if split else "test"])
    if overlap:
        labels, poses = labels[:, 0], poses[:, 0]
    ground = images.float().flatten(2).median(2).values[..., None, None]
    ink = (images - ground).abs().sum(1).flatten(1)

    def standard(pixels):
        return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)

    def likeness(labels, poses):                                  # correlation, (b,)
        template = pose_glyphs(glyphs.mean(0)[labels], poses).flatten(1)
        return (standard(ink) * standard(template)).sum(1)

    true = likeness(labels, poses)
    for column, (low, high) in enumerate(POSE.values()):          # each column matters
        wrong = poses.clone()
        wrong[:, column] = low + high - wrong[:, column]          # mirrored about its middle
        far = (wrong - poses)[:, column].abs() > .5 * (high - low)
        assert (true - likeness(labels, wrong))[far].mean() > .02, list(POSE)[column]
    assert true.mean() > likeness((labels + 1) % 10, poses).mean() + .1


def test_overlapping_digits_differ_and_come_in_pairs():
    images, labels, poses = draw_digits(300, False, 0, overlap=True)
    assert images.shape == (300, 3, 32, 32) and labels.shape == (300, 2)
    assert poses.shape == (300, 2, 5)
    assert (labels[:, 0] != labels[:, 1]).all()
    assert (poses[:, 0, 0] - poses[:, 1, 0]).abs().min() >= 2


def test_each_split_draws_in_its_own_typefaces_alone(monkeypatch):
    train, test = draw_digits(20, True)[0], draw_digits(20, False)[0]
    monkeypatch.setitem(TYPEFACES, "train", ["cmr10"])
    assert torch.equal(draw_digits(20, False)[0], test)
    assert not torch.equal(draw_digits(20, True)[0], train)


def test_of_two_overlapping_digits_the_upper_one_comes_first(monkeypatch):
    monkeypatch.setitem(TYPEFACES, "test", ["DejaVuSans-Bold"])
    images, labels, poses = draw_digits(100, False, 0, overlap=True)
    glyphs = rasterise(TYPEFACES["test"])[0][0]
    upper, lower = (pose_glyphs(glyphs[labels[:, k]], poses[:, k]) > .9 for k in (0, 1))

    def colour(mask):                                             # mean over the mask, (b, 3)
        mask = mask.unsqueeze(1)
        return (images * mask).sum((2, 3)) / mask.sum((2, 3))
    both, above, below = colour(upper & lower), colour(upper & ~lower), colour(lower & ~upper)
    fits = (both - above).norm(dim=1) < (both - below).norm(dim=1)
    told_apart = (above - below).norm(dim=1) > 20
    assert told_apart.sum() > 30 and fits[told_apart].float().mean() > .9


def test_the_readme_agrees_with_the_published_results(monkeypatch, capsys):
    monkeypatch.chdir(Path(train.__file__).parent)
    assert train.main(["--report", "--check"]) == 0, capsys.readouterr().err
