"""A run is never lost, never wrong: faults are caused for real, in processes of their own."""
import dataclasses
import errno
import functools
import io
import json
import logging
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from conftest import (
    FOLDER,
    Job,
    assert_one_line,
    at_step,
    full_disk,
    kill_at,
    kill_in_write,
    nan_feedback,
    nan_loss,
    poison,
    port,
    run,
    send,
    state_of,
    two_processes,
)
from lab.checkpoint import caught_signals, check_same, load_checkpoint, newest
from lab.config import make_config
from lab.runtime import Problem, write_file

# ---- A run is never lost: resume is exact --------------------------------------------------------

# twelve steps with everything that is random or annealed: 4 an epoch, saved after each
EXACT = f"{FOLDER} --epochs 3 --augment ++ --flip --loss spread --save-every 0 --output-dir run"


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


@pytest.mark.parametrize("steps", [(1, 4, 5), (7, 2)])
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


def assert_same_run_but(a, b, *fields):
    ours, theirs = log_of(a), log_of(b)
    assert [{**ours[0], **{f: theirs[0][f] for f in fields}}, *ours[1:]] == theirs
    for x, y in zip(flat(state_of(a)["net"]), flat(state_of(b)["net"]), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_kill_9_at_each_moment_of_writing_a_checkpoint(reference, place):
    """Before each call of a save that the disk must see, some run dies, and the next goes on."""
    start = EXACT
    for k in range(4, 12):
        done = run(place, start, sabotage=[functools.partial(kill_in_write, k)])
        assert done.code == -signal.SIGKILL
        assert load_checkpoint(place / "run")["epoch"] <= 1
        start = "--resume run"
    assert run(place, "--resume run").code == 0
    assert_same_run(place / "run", reference)
    assert not list(place.glob("run/*.tmp"))


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


def signal_twice(apart, optimizer):
    send(signal.SIGTERM)
    time.sleep(apart)
    send(signal.SIGTERM)


@pytest.mark.parametrize("apart, code, saved", [(0, 143, (1, 2)), (1.1, -signal.SIGTERM, (0, 0))])
def test_a_second_signal_stops_at_once_but_a_repeated_one_does_not(apart, code, saved, place):
    """torchrun repeats what a terminal has sent to all; a user who sends another waits a moment."""
    act = functools.partial(at_step, 6, functools.partial(signal_twice, apart))
    rarely = EXACT.replace("--save-every 0", "--save-every 1000")
    assert run(place, rarely, sabotage=[act]).code == code
    state = state_of(place / "run")
    assert (state["epoch"], state["step"]) == saved


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


@pytest.mark.parametrize("damage", [cut(0), flip_a_byte], ids=["cut", "flip"])
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
        assert "last.pt is damaged" in done.out
        assert_one_line(done.last(), "previous.pt is damaged")
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
    assert "last.pt is damaged or not" in run(place, "--resume run --test-only").out
    assert not (place / "executed").exists()


def test_a_disk_that_fails_altogether_is_one_problem(tmp_path, monkeypatch):
    def fail(*given, **keywords):
        raise OSError(30, "Read-only file system")
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(Problem, match="cannot write .*Read-only"):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_checkpoint(reference, place):
    done = run(place, EXACT, sabotage=[functools.partial(at_step, 6, full_disk)])
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
    assert done.code == 1 and f"epoch 2, by step {step}: {culprit} is not finite" in last, last
    assert (state["epoch"], state["step"]) == (1, step - 1)
    assert all(t.isfinite().all() for t in state["net"].values() if t.is_floating_point())


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
    assert_one_line(run(place, EXACT, "--lr 0.1").last(), "lr", "another --output-dir",
                    "--resume run --epochs N")


def test_the_same_output_dir_goes_on(half, reference, place):
    done = run(place, EXACT)
    assert done.code == 0 and "going on after epoch 1, step 1" in done.out
    assert_same_run(half, reference)
    before = {p: p.read_bytes() for p in half.iterdir()}
    done = run(place, EXACT)
    assert done.code == 0 and "already finished" in done.out
    assert {p: p.read_bytes() for p in half.iterdir()} == before


def test_a_run_that_was_moved_goes_on_where_it_lies(half, reference, place):
    half.rename(place / "moved")
    assert run(place, "--resume moved/last.pt").code == 0
    assert_same_run(place / "moved", reference)
    assert not half.exists() and [file.name for file in (place / "runs").iterdir()] == [
        "results.jsonl"]


def test_damage_found_at_a_resume_never_replaces_the_checkpoint_before(half, place):
    """Killed before the first save of its own, a run that fell back can fall back again."""
    (half / "last.pt").write_bytes(cut(.5)((half / "last.pt").read_bytes()))
    good = (half / "previous.pt").read_bytes()
    for k in (1, 2, 3):
        done = run(place, "--resume run", sabotage=[functools.partial(kill_in_write, k)])
        assert done.code == -signal.SIGKILL
        assert (half / "previous.pt").read_bytes() == good
    assert load_checkpoint(half)["step"] == 4


def moved(place):
    """The images lie elsewhere, and nowhere else."""
    images = Path(shutil.copytree(place / "data", place / "elsewhere"))
    (place / "data").unlink()
    return images


def test_images_moved_and_renamed_are_the_same_images(half, reference, place):
    moved(place)
    done = run(place, "--resume run --data-path elsewhere")
    assert done.code == 0 and "elsewhere: 32 + 10 images" in done.out
    assert_same_run(half, reference)


@pytest.mark.parametrize("change", [
    lambda root: (root / "test/bee/0.png").rename(root / "test/bee/00.png"),
    lambda root: (root / "train/ant/0.png").write_bytes((root / "train/ant/0.png").read_bytes()
                                                        + b"0"),
    lambda root: shutil.copy(root / "test/ant/0.png", root / "test/ant/9.png"),
    lambda root: (root / "train/ant/0.png").rename(root / "train/bee/99.png"),
    lambda root: [(root / s / "cat").rename(root / s / "cow") for s in ("train", "test")],
], ids=["name", "size", "number", "class", "classes"])
def test_other_images_are_refused_with_the_way_out(change, half, place):
    change(moved(place))
    before = {p: p.read_bytes() for p in half.iterdir() if p.suffix == ".pt"}
    done = run(place, "--resume run --data-path elsewhere").last()
    assert_one_line(done, "other images", "--data-path", "--init run")
    assert {p: p.read_bytes() for p in half.iterdir() if p.suffix == ".pt"} == before


@pytest.mark.parametrize("schedule, epochs, refused", [
    ("steps", 8, False), ("steps", 3, False), ("steps", 2, True),
    ("one-cycle", 8, True), ("one-cycle", 6, False)])
def test_epochs_may_change_where_the_rate_of_those_done_does_not(schedule, epochs, refused):
    """Of six epochs three are done.  One cycle is planned as a whole."""
    before = make_config(dataset="mnist", schedule=schedule, milestones=(2,), epochs=6)
    data = SimpleNamespace(classes=["0"], source="")
    state = {"config": dataclasses.asdict(before), "epoch": 3, "data": vars(data)}
    with pytest.raises(Problem, match=f"epochs 6 -> {epochs}") if refused else nullcontext():
        check_same(dataclasses.replace(before, epochs=epochs), data, state, "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_run_a_signal_is_what_it_was_before(number):
    before = signal.getsignal(number)
    with caught_signals():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


def test_a_finished_run_does_not_answer_for_other_images(reference, place):
    run_of_others = Path(shutil.copytree(reference, place / "run"))
    (moved(place) / "test/ant/0.png").unlink()
    assert_one_line(run(place, EXACT, "--data-path elsewhere").last(), "other images", "--init run")
    assert (run_of_others / "result.json").exists()


def test_the_newest_run_is_the_last_saved(half, place, monkeypatch):
    """Also one killed between two renames, which has only the checkpoint before."""
    monkeypatch.chdir(place)
    runs = Path("runs")
    assert newest() is None
    for name in ("older", "new", "old"):
        shutil.copytree(half, runs / name)
    (runs / "empty").mkdir()
    (runs / "new/last.pt").unlink()
    for age, name in enumerate(("older", "old", "new", "empty")):
        os.utime(runs / name, (age, age))
    assert newest() == newest(finished=True) == "runs/new"
    (runs / "new/result.json").write_text("{}")
    os.utime(runs / "new", (2, 2))
    assert newest() == "runs/old" and newest(finished=True) == "runs/new"


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


# ---- Places that lack something ------------------------------------------------------------------

def break_after(words, sabotage, place):
    """A run of one epoch with these acts first -> Done; it must have been saved."""
    done = run(place, FOLDER, "--output-dir run", words, sabotage=sabotage)
    assert done.code == 0 and load_checkpoint(place / "run")["epoch"] == 1, done
    assert (place / "run/result.json").exists()
    return done


def no_fcntl():
    sys.modules["fcntl"] = None                           # as on Windows: importing it fails


def no_flock():
    import fcntl

    def refuse(*words):
        raise OSError(errno.ENOTSUP, "Operation not supported")
    fcntl.flock = refuse


@pytest.mark.parametrize("act", [no_fcntl, no_flock])
def test_without_locks_a_run_goes_on_and_says_so_in_one_line(act, place):
    whole = break_after("", [], place)
    shutil.rmtree(place / "run")
    lacking = break_after("--save-every 0", [act], place)
    assert len(lacking.out.splitlines()) == len(whole.out.splitlines()) + 1


def test_without_git_a_run_goes_on(place):
    done = run(place, FOLDER, "--output-dir run", env={"PATH": str(place)})
    assert done.code == 0
    header = json.loads((place / "run/log.jsonl").read_text().splitlines()[0])
    assert header["environment"]["commit"] is None


def runs_cannot_be_written():
    Path("runs").write_text("")                           # a file, which root cannot write into


def test_a_working_folder_that_cannot_be_written_costs_only_the_line_of_results(place):
    """With an --output-dir; and it is finished then.  Without one nothing is read first."""
    break_after("", [runs_cannot_be_written], place)
    assert "already finished" in run(place, "--resume run").out
    done = run(place, FOLDER)
    assert_one_line(done, "runs/", code=1)


@pytest.mark.parametrize("where", ["data/train/ant/0.png/run", "/proc/run"])
def test_an_output_dir_that_cannot_be_written_is_found_before_images_are_read(where, place):
    assert_one_line(run(place, FOLDER, f"--output-dir {where}"), where, code=1)


def test_a_run_that_does_not_begin_leaves_no_folder(place):
    (place / "mine").mkdir()
    (place / "mine/notes").write_text("")
    for folder in ("new/run", "mine"):
        assert_one_line(run(place, FOLDER, "--set types=0 --output-dir", folder).last(), "types")
    assert not (place / "new/run").exists() and (place / "mine/notes").exists()
    assert run(place, FOLDER, "--set types=0").code == 2 and not list(place.glob("runs/*"))


def test_the_first_lines_say_how_to_go_on(place):
    """What Ctrl-C has also taken the reader of the last line from is known from them."""
    act = functools.partial(at_step, 2, functools.partial(send, signal.SIGINT))
    done = run(place, EXACT, sabotage=[act])
    assert done.code == 130
    assert "--resume run" in done.out.rpartition("train.py: stopped")[0]


# ---- Several processes ---------------------------------------------------------------------------

GLOBAL = f"{FOLDER} --workers 0 --weight-decay 0 --output-dir run"


def note_what_is_read(file):
    """Append a process's rank for every image it opens, after a moment."""
    true, rank = Image.open, os.environ["RANK"]

    def opened(*words):
        time.sleep(.01)
        with open(file, "a") as out:
            out.write(rank)
        return true(*words)
    Image.open = opened


def image_by_image():
    """BatchNorm by each image's own moments; what it keeps must be rank 0's wherever it is used."""
    def forward(self, x):
        assert not self.running_mean.any()
        self.running_mean += self.training and int(os.environ.get("RANK", 0))
        return F.group_norm(x, 1, self.weight, self.bias)
    torch.nn.BatchNorm2d.forward = forward


def test_two_processes_do_what_one_does(place):
    """Loss, feedback over the gathered batch, gradient, and the count of evaluated images.

    But for BatchNorm, which on a CPU sees a process's own images; here it is made to see one.
    """
    words = GLOBAL + " --optimizer sgd --batch-size 16 --save-every 0 --augment ++ --flip " \
        "--test-images 13"
    for name in ("one", "two"):
        (place / name).mkdir()
        (place / name / "data").symlink_to((place / "data").resolve())
    act = functools.partial(note_what_is_read, str(place / "read.txt"))
    pair = two_processes(place / "two", words, sabotage=([act, image_by_image],) * 2)
    assert run(place / "one", words, sabotage=[image_by_image]).code == 0
    done = [job.wait() for job in pair]
    assert [d.code for d in done] == [0, 0]
    assert (place / "read.txt").read_text() == 45 * "0" + 45 * "1"    # rank 0 first: it downloads
    assert "test error" in done[0].out and done[1].out == ""          # rank 0 alone speaks
    one, two = state_of(place / "one/run"), state_of(place / "two/run")
    assert list(one["net"]) == list(two["net"])                       # no prefix of DDP
    gradients, others = ([m["momentum_buffer"] for m in state["optimizer"]["state"].values()]
                         for state in (one, two))         # what they are after two steps
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


def test_a_killed_rank_ends_the_job(place):
    jobs = two_processes(place, GLOBAL + " --save-every 0", sabotage=((), [kill_at(2)]))
    done = [job.wait() for job in jobs]
    assert done[1].code == -9 and done[0].code == 1 and "train.py: " in done[0].err, done
    assert state_of(place / "run")["step"] == 1


def test_signal_to_one_rank_stops_both_after_the_same_step(place):
    act = functools.partial(at_step, 2, functools.partial(send, signal.SIGTERM))
    jobs = two_processes(place, GLOBAL, sabotage=((), [act]))
    assert [job.wait().code for job in jobs] == [143, 143]
    assert (state_of(place / "run")["epoch"], state_of(place / "run")["step"]) == (0, 2)


def dies_once(words):
    """A worker of torchrun's; rank 1 is killed on its first start."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_at(6)()
    sys.exit(train.main(words))


def torchrun(address, words):
    """What torchrun's command line does, with workers that are forked."""
    logging.disable()                                     # its report of a death has a traceback
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=.1,
        rdzv_backend="static", rdzv_endpoint=address, rdzv_configs={"rank": 0}, start_method="fork")
    elastic_launch(config, dies_once)(words)


def test_torchrun_restarts_by_itself(place, tmp_path_factory):
    """One rank dies once; the restarted job ends as one that nothing happened to."""
    words = GLOBAL + " --epochs 3 --save-every 0 --augment +"
    whole = tmp_path_factory.mktemp("whole")
    (whole / "data").symlink_to((place / "data").resolve())
    for job in two_processes(whole, words):
        assert job.wait().code == 0
    act = functools.partial(torchrun, f"127.0.0.1:{port()}", shlex.split(words))
    done = run(place, "--list", sabotage=[act])           # trains before it lists
    assert done.code == 0 and "going on after epoch 1, step 1" in done.out, done
    assert_same_run(place / "run", whole / "run")


# ---- Load ----------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("epochs", [10, pytest.param(1250, marks=pytest.mark.slow)])
def test_memory_and_open_files_do_not_grow(epochs, place):
    """16 steps an epoch, a save every other second; a look an epoch's worth of steps."""
    act = functools.partial(watch_resources, epochs, str(place / "seen.txt"))
    done = Job(place, FOLDER, f"--batch-size 2 --epochs {epochs} --save-every 2",
               "--set feedback=0 --output-dir run", sabotage=[act]).wait(3600)
    assert done.code == 0
    memory, files = zip(*(map(int, line.split())
                          for line in (place / "seen.txt").read_text().splitlines()), strict=True)
    assert len(memory) == 16 and max(files) <= files[3]
    assert max(memory) - memory[3] < 15_000, memory       # kilobytes


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
        state = load_checkpoint("fuzz.pt")
    except Problem as problem:
        assert "fuzz.pt" in str(problem) and "\n" not in str(problem)
        return
    for x, y in zip(flat(state), flat(state_of(trained)), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


PLAIN = st.recursive(st.none() | st.integers(-3, 3) | st.text(max_size=3) | st.just(torch.ones(2)),
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
                         st.text(max_size=3), inner, max_size=2), max_leaves=4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
