"""What every test starts from (a thread, a seed, hypothesis), and ways to run train.py.

Runs without faults go through train.main in this process; faults are caused for real, in processes
forked from a server that has imported torch once (a fork costs 0.1 s, an import 5).
"""
import functools
import math
import multiprocessing
import os
import resource
import shlex
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

import encapnet
import lab.fit
import train

HERE = Path(__file__).parent
NARROW = "--model encapnet-small --set types=2 --set dims=(1,1,2,2)"
SMALL = "--train-images 32 --test-images 10 --batch-size 8"
TINY = f"{NARROW} {SMALL} --epochs 1"
FOLDER = f"--dataset folder --recipe paper {TINY} --lr 1e-3"             # in data/, see `place`

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True,
                          print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get(
    "HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "default"))

torch.set_num_threads(1)     # small tensors: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def seeded():
    """Layers are initialised alike in every test (once a test, not once an example), and a run
    with --deterministic in one test leaves the others as they are."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


# ---- Ways to run train.py ------------------------------------------------------------------------

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
server.set_forkserver_preload(["conftest", "torchvision.transforms.v2", "matplotlib.figure",
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
    lab.fit.draw_run = lambda *run: None                  # costs a second; drawn in other tests
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


def kill_in_write(k):
    """kill -9 before the k-th call that makes what was written last: os.fsync or os.replace."""
    count = iter(range(1, 10**9))

    def deadly(call, *words):
        if next(count) == k:
            send(signal.SIGKILL)
        call(*words)
    os.fsync = functools.partial(deadly, os.fsync)
    os.replace = functools.partial(deadly, os.replace)


def nan_loss(k):
    true, count = encapnet.margin_loss, iter(range(1, 10**9))
    encapnet.margin_loss = lambda *a: true(*a) * (float("nan") if next(count) == k else 1)


def nan_feedback(k):
    cls, count = encapnet.MODELS["encapnet-small"].network, iter(range(1, 10**9))
    true = cls.forward

    def forward(self, x):
        scores, feedback = true(self, x)
        poisoned = self.training and next(count) == k
        return scores, feedback * (float("nan") if poisoned else 1)
    cls.forward = forward


def state_of(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, pictures):
    """A finished run of the folder; copy nothing, change nothing."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(pictures)
    assert run(folder, FOLDER, "--epochs 2 --output-dir run").code == 0
    return folder / "run"


# ---- Oracles that several rooms need -------------------------------------------------------------

def agreement_by_hand(layer, u, v, labels):
    """Vote by vote: cosine with the true class's capsule v (B, K, d), in bins of a tenth."""
    count, total = np.zeros(20), np.zeros(20)
    W, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias if layer.bias is not
                                                     None else torch.zeros(1)))
    u, v = u.double().numpy(), v.double().numpy()
    for b, j in enumerate(labels.tolist()):
        for g in range(u.shape[1]):
            for p in range(u.shape[2]):
                vote = u[b, g, p] @ W[g, :, j] + (bias[g, j] if bias.ndim > 1 else 0)
                cosine = vote @ v[b, j] / np.linalg.norm(vote) / np.linalg.norm(v[b, j])
                k = min(19, math.floor((cosine + 1) * 10))
                count[k], total[k] = count[k] + 1, total[k] + np.linalg.norm(vote)
    return 100 * count / count.sum(), total / np.maximum(1, count)
