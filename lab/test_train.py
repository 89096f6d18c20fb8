"""The command line: flags, recipes, one line for a mistake; a trained network in use; fuzz."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import encapnet
import lab.config
import train
from conftest import FOLDER, HERE, NARROW, Done, assert_one_line, kill_at, run, state_of
from lab import bench, fit, runtime
from lab.config import DATASETS, PEERS, Config, make_config, merge
from lab.fit import batch_size, learning_rate
from lab.results import config_key
from lab.runtime import Problem, count, guarded, reason
from lab.tables import row_config
from lab.use import load

# ---- Command line and Config ---------------------------------------------------------------------

def test_the_default_run_in_small(cli, place):
    done = cli("--train-images 64 --test-images 20 --set types=2 --epochs 2")
    folder = place / "runs/digits-encapnet-small-0"
    lines = [line for line in done.out.splitlines() if line.startswith("epoch")]
    assert done.code == 0 and not done.err and len(lines) == 2
    assert re.match(r"epoch +1/2 .* error: train .* %  test .* %  \d+ images/s", lines[0])
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
    for part in ("--milestones", "default: (200, 300, 400)", "[Sec. 5]", "default: 128", "--table"):
        assert part in text, part
    flip, = re.findall(r"^  --flip.*?(?=^  --)", text, re.M | re.S)
    assert flip.count("default") == 1                     # it depends on the data
    done = cli("--list")
    for name in (*encapnet.MODELS, *DATASETS, "--table 5", "--figure 4", "resnet101"):
        assert name in done.out, name
    about = dict(line.split(maxsplit=1) for line in done.out.splitlines() if line[:2] == "  ")
    models = [about[name] for name in (*encapnet.MODELS, "resnet101", "vgg16")]
    assert len(set(models)) == len(models)                               # told apart
    assert "128x128" in about["encapnet-v2"] and "224x224" in about["encapnet-v3"]


@pytest.mark.parametrize("n, noun, text", [
    (0, "epoch", "0 epochs"), (1, "epoch", "1 epoch"), (2, "thread", "2 threads"),
    (1, "class", "1 class"), (1000, "class", "1,000 classes")])
def test_numbers_of_things(n, noun, text):
    assert count(n, noun) == text


@pytest.mark.parametrize("words, wanted", [
    ("--modle encapnet", "--modle"),
    ("--model encapnet7", "encapnet6"), ("--dataset cifar", "cifar10"),
    ("--epochs -1", "--epochs"), ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--lr x", "'x'"),
    ("--batch-size 0", "--batch-size"), ("--batch-size 1.5", "whole number"),
    ("--clip -1", "--clip"), ("--clip x", "invalid number"),
    ("--set types", "'types'"), ("--table 9", "--table"), ("--loss hinge", "spread-fixed"),
    ("--device tpu9", "--device"), ("--set tipes=2 --train-images 9", "types"),
    ("--set types=0 --train-images 9", "types"), ("--model resnet18 --loss margin", "logits"),
    ("--resume nowhere", "nowhere"), ("--resume", "runs"),
    ("--test-only", "runs"), ("--predict x.png --resume nowhere", "nowhere"),
    ("--table 3 --row nothing", "nothing"), ("--table 3 --model encapnet", "--model"),
    ("--bench --resume runs/x", "--resume"), ("--bench --init runs/x", "--init"),
    ("--resume . --test-only", "no such checkpoint"),
    ("--bench --output-dir x", "--output-dir"),
    ("--report", "README.md"), ("extra", "extra"), ("--milestones 0", "--milestones"),
])
def test_a_mistake_is_one_line(words, wanted, cli):
    """And makes no folder."""
    assert_one_line(cli(words), wanted)
    assert not list(Path("runs").glob("digits-*"))


def test_only_problems_choose_the_exit_code(capsys):
    def fail(words):
        raise urllib.error.HTTPError("http://x", 404, "gone", {}, None)
    assert guarded("x.py", fail, []) == 1
    assert "unexpected HTTPError" in capsys.readouterr().err


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys):
    def fail(words):
        raise OSError(28, "No space left on device", "runs/x.png")
    assert guarded("x.py", fail, []) == 1
    assert_one_line(Done(1, *capsys.readouterr()), "runs/x.png: No space left", code=1)


def worker_fails(k):
    raise RuntimeError("unable to write: No space left on device (28)\nmore of it")


def test_one_line_holds_the_cause():
    """A worker process's own; what follows a colon; and the rest."""
    loader = torch.utils.data.DataLoader(range(4), num_workers=1, collate_fn=worker_fails)
    with pytest.raises(RuntimeError) as raised:
        next(iter(loader))
    assert str(raised.value).startswith("Caught")         # the first line is no cause
    assert reason(raised.value) == \
        "RuntimeError: unable to write: No space left on device (28)"
    inductor = "backend='inductor' raised:\nNo working C++ compiler found\n\nSet TORCHDYNAMO..."
    assert reason(RuntimeError(inductor)) == \
        "backend='inductor' raised: No working C++ compiler found"
    assert reason(ValueError("one\ntwo")) == "one" and reason(ValueError(" ")) == "ValueError"


@pytest.mark.parametrize("name, there, rank, device", [
    ("auto", True, None, "cuda"), ("auto", False, None, "cpu"), ("auto", True, "3", "cuda:3"),
    ("cuda", True, "1", "cuda:1"), ("cuda:0", True, "1", "cuda:0"), ("cpu", True, "1", "cpu")])
def test_a_device_is_the_gpu_where_there_is_one_and_of_several_processes_each_its_own(
        name, there, rank, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)     # it can be used
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert runtime.pick_device(name) == torch.device(device)


def test_a_batch_is_refused_that_does_not_divide_among_processes(monkeypatch):
    monkeypatch.setattr(runtime, "world", lambda: 3)
    assert runtime.start(make_config(batch_size=6, device="cpu")) == torch.device("cpu")
    with pytest.raises(Problem, match="--batch-size 8 .* 3 processes"):
        runtime.start(make_config(batch_size=8, device="cpu"))


def test_debug_shows_the_traceback(cli):
    assert "Traceback" in cli("--resume nowhere --debug").err


# Every field of a Config, with its source.  Sec. 5: "Initial learning rate is set to 0.0001 and
# reduced by 90% with a schedule [200, 300, 400] in epoch unit. Maximum epoch is 600. Adam is used
# with [...] weight decay 5 x 10^-4. Batch size is 128"; Sec. 3.2: lambda "set to be 10".
SECTION_5 = dict(optimizer="adam", lr=1e-4, gamma=0.1, schedule="steps", epochs=600,
                 milestones=(200, 300, 400), weight_decay=5e-4, batch_size=128)
SECTION_3 = dict(loss="margin", lam=10)
NOTHING_ADDED = dict(steps=0, fit_batch=False, clip=0, augment="none", flip=False, train_images=0,
                     test_images=0, resample=False, hold_out=False, set={}, init="", class_list="")
THIS_RUN = dict(seed=0, device="auto", amp=False, compile=False, channels_last=False,
                deterministic=False, output_dir="", resume=None, save_every=60, print_freq=50,
                data_path="data", unreadable="stop", workers=min(8, os.cpu_count()))
PAPER = {**SECTION_5, **SECTION_3, **NOTHING_ADDED, **THIS_RUN, "model": "encapnet",
         "image_size": 32}
LARGE = {"h-imagenet": dict(batch_size=256, image_size=128, set={"stem_stride": 4}),     # Sec. 5.2
         "imagenet": dict(batch_size=256, image_size=224, set={"stem_stride": 4})}
MINUTES = dict(model="encapnet-small", schedule="one-cycle", lr=3e-3, batch_size=64, lam=0.1,
               clip=1, channels_last=True)                               # ours, as is what follows
RECIPES = {
    "paper": {},
    "default": {"digits": dict(MINUTES, epochs=2, train_images=16000, test_images=2000),
                "folder": dict(MINUTES, steps=400, fit_batch=True, augment="+", flip=True)},
    "fast": dict.fromkeys(DATASETS, dict(schedule="one-cycle", epochs=30, batch_size=512, lr=4e-3,
                                         clip=1, fit_batch=True, amp=True))}


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_every_recipe(recipe, dataset, monkeypatch):
    """On a GPU, where recipe fast computes in bfloat16; on a CPU none does."""
    expected = {**PAPER, **LARGE.get(dataset, {}), **RECIPES[recipe].get(dataset, {}),
                "dataset": dataset, "recipe": recipe}
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(lab.config, "pick_device", lambda name: torch.device(device))  # noqa: B023
        expected["amp"] = recipe == "fast" and device == "cuda"
        assert dataclasses.asdict(make_config(dataset=dataset, recipe=recipe)) == expected


def test_the_default_run_is_of_digits():
    assert make_config() == make_config(dataset="digits", recipe="default")


FLIPS = {"digits": False, "mnist": False, "svhn": False, "fashion-mnist": True, "cifar10": True,
         "cifar100": True, "folder": True, "h-imagenet": True, "imagenet": True}


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_digit_is_never_mirrored_unless_asked_for(dataset):
    """DESIGN, 4.9: ++ mirrors photographs, in training and in its test of many crops."""
    assert make_config(dataset=dataset, augment="++").flip is FLIPS[dataset]
    assert DATASETS[dataset].flips is FLIPS[dataset]
    assert make_config(dataset=dataset, flip=True).flip


def test_epochs_scale_milestones_and_jitter_trains_longer():
    assert make_config(dataset="cifar10", epochs=6).milestones == (2, 3, 4)
    longer = make_config(dataset="cifar10", augment="++")
    assert (longer.epochs, longer.milestones) == (900, (300, 450, 600))
    assert make_config(dataset="folder", augment="++").steps == 600
    assert make_config(dataset="cifar10", augment="++", epochs=7).epochs == 7


def test_a_recipe_of_few_epochs_has_its_milestones_within_them():
    """Where the schedule asked for has any."""
    assert make_config(schedule="steps").milestones == pytest.approx((2 / 3, 1, 4 / 3))
    assert make_config(schedule="steps", epochs=6).milestones == (2, 3, 4)
    fast = make_config(dataset="mnist", recipe="fast", schedule="steps")
    assert (fast.epochs, fast.milestones) == (30, (10, 15, 20))


def test_a_model_brings_its_size_and_its_loss():
    assert make_config(dataset="h-imagenet", model="encapnet-v3").image_size == 224
    assert make_config(dataset="imagenet", model="encapnet-v3", image_size=64).image_size == 64
    assert make_config(dataset="imagenet", model="resnet18").set == {}   # has no stem_stride
    logits = ["cnn-same", "cnn-similar", "resnet18", "resnet101", "wide_resnet101_2", "vgg16",
              "googlenet"]
    models = (*encapnet.MODELS, *PEERS)
    assert [m for m in models if make_config(dataset="svhn", model=m).loss == "ce"] == logits


TWENTIETH = [(100, 64, 5), (800, 64, 40), (1280, 64, 64), (50000, 64, 64), (50000, 512, 512),
             (800, 512, 40), (30, 64, 2), (2, 64, 2)]


@pytest.mark.parametrize("images, most, batch", TWENTIETH)
def test_a_recipe_s_batch_is_at_most_a_twentieth_of_the_images(images, most, batch):
    """At least two; but what is given is taken, and the paper's is the paper's."""
    recipe = "fast" if most == 512 else "default"
    fields = dict(dataset="folder", recipe=recipe)
    assert batch_size(make_config(**fields), images) == batch
    assert batch_size(make_config(**fields, batch_size=most), images) == min(most, images)
    assert batch_size(make_config(dataset="folder", recipe="paper"), images) == min(128, images)
    fast = make_config(dataset="mnist", recipe="fast")
    assert batch_size(fast, images) == min(512, max(2, images // 20))


def test_every_flag_goes_before_the_recipe_of_own_images():
    given = make_config(dataset="folder", epochs=7, batch_size=9, lr=1., lam=2., flip=False,
                        augment="none", model="encapnet6", clip=0., schedule="steps")
    assert (given.epochs, given.steps, given.batch_size, given.fit_batch, given.lr, given.lam,
            given.flip, given.augment, given.model, given.clip, given.schedule) == (
        7, 0, 9, False, 1, 2, False, "none", "encapnet6", 0, "steps")
    assert given.milestones == (2, 4, 5)
    for fields in (dict(milestones=(3,)), dict(steps=9, epochs=3)):
        with pytest.raises(Problem, match="--steps"):
            make_config(dataset="folder", **fields)


def test_what_is_given_goes_before_fast_before_the_data_sets_before_the_papers():
    assert merge({"lr": 1, "set": {"a": 1, "b": 1}}, {"set": {"b": 2}}) == \
        {"lr": 1, "set": {"a": 1, "b": 2}}
    fields = dict(dataset="imagenet", set={"types": 4})
    paper, fast = make_config(**fields), make_config(**fields, recipe="fast")
    assert (paper.lr, paper.batch_size, paper.clip) == (1e-4, 256, 0)    # the paper's, imagenet's
    assert fast.batch_size > 256 and fast.lr > 1e-4 and fast.clip == 1
    given = make_config(**fields, recipe="fast", lr=.5, batch_size=8, clip=0.)
    assert (given.lr, given.batch_size, given.clip, given.epochs) == (.5, 8, 0, fast.epochs)
    assert fast.set == {"types": 4, "stem_stride": 4}     # what is big is made smaller at once
    assert make_config(dataset="imagenet", set={"stem_stride": 2}).set == {"stem_stride": 2}
    assert make_config(dataset="cifar10").set == {}


def test_tables_keep_to_the_paper_on_a_folder_of_images():
    row = row_config(dict(model="encapnet6"), dict(dataset="folder", data_path="x"))
    assert (row.lr, row.epochs, row.steps, row.lam, row.augment) == (1e-4, 600, 0, 10, "none")
    assert row_config(dict(model="encapnet6"), dict(dataset="folder", recipe="fast")).lr == 4e-3
    assert row_config(dict(model="encapnet6"), dict(dataset="digits")).lr == 3e-3


def test_steps_settle_the_epochs_and_a_run_goes_on_with_them(cli, monkeypatch):
    """20 images in batches of 2: 10 steps an epoch; the same command again is the same run."""
    monkeypatch.setattr(fit, "draw_run", lambda *run: None)
    words = f"--data-path data {NARROW} --schedule steps --output-dir run --augment none " \
        "--train-images 20 --test-images 3"
    assert cli(words, "--steps 25").code == 0             # two and a half epochs
    for config in (json.loads(Path("run/result.json").read_text())["config"],
                   state_of("run")["config"], state_of("run")["header"]["config"]):
        assert (config["epochs"], config["steps"]) == (2, 0)
        assert list(config["milestones"]) == [2 / 3, 1, 4 / 3]
    assert "already finished" in cli(words, "--steps 25").out
    assert "going on" in cli("--resume run --epochs 3").out
    result = json.loads(Path("run/result.json").read_text())
    assert result["epochs"] == result["config"]["epochs"] == 3           # by which it is found
    assert_one_line(cli("--resume run --recipe fast"), "recipe")
    assert cli(words, "--steps 1 --output-dir one").code == 0            # an epoch at least
    assert json.loads(Path("one/result.json").read_text())["epochs"] == 1


def test_a_data_path_alone_means_own_images(cli, monkeypatch):
    asked, true = [], train.fit
    monkeypatch.setattr(train, "fit", lambda config: asked.append(config) or pytest.skip)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for words in ("--data-path data", "--data-path=~/data"):
        assert "--dataset folder" in cli(words).out
        assert asked[-1].dataset == "folder" and asked[-1].model == "encapnet-small"
        assert Path(asked[-1].data_path).samefile("data")
    cli("--data-path data --dataset digits")
    assert asked[-1].dataset == "digits" and len(asked) == 3
    monkeypatch.setattr(train, "fit", true)
    Path("empty").mkdir()
    for path in ("empty", "nowhere", "data/train"):
        done = cli(f"--data-path {path}")
        assert "--dataset folder" in done.out
        assert_one_line(done, f"no folder {path}/train", "/train/CLASS/*.jpg")


@pytest.mark.parametrize("flag", ["--data-path", "--output-dir", "--resume", "--init",
                                  "--class-list"])
def test_a_tilde_is_the_home_in_every_path(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/at/home")
    _, given = train.parse([f"{flag}=~/x"])
    assert list(given.values()) == ["/at/home/x"]


def test_the_last_line_says_what_the_run_came_to(cli, monkeypatch):
    """At chance; and before it, where classes are unbalanced, which are worst."""
    errors = {"ant": 10., "bee": None, "cat": 50., "dog": 0., "eel": 20.}
    result = dict(config={"dataset": "digits"}, error=20., epochs=0, seconds=0, folder="x",
                  class_errors=errors, multi_crop=False)
    for outcome, unbalanced in (("ok", False), ("ok", True), ("at chance", False)):
        monkeypatch.setattr(train, "fit", lambda config, **more: {
            **result, "outcome": outcome, "unbalanced": unbalanced})     # noqa: B023
        *before, last = cli("").out.splitlines()
        assert "test error 20.00 %" in last and ("at chance" in last) is (outcome != "ok")
        worst = [line for line in before if "cat 50.0 %, eel 20.0 %, ant 10.0 %" in line]
        assert len(worst) == unbalanced and "dog" not in "".join(worst)


def test_a_key_names_a_result_whatever_the_seed_and_place():
    one = make_config(dataset="svhn", output_dir="a", seed=1, workers=0)
    two = make_config(dataset="svhn", output_dir="b", seed=2, workers=3)
    assert config_key(one) == config_key(two)
    for change in (dict(lr=1e-3), dict(set={"types": 8}), dict(epochs=9), dict(augment="+")):
        other = make_config(dataset="svhn", **change)
        assert config_key(other) != config_key(one)


def test_a_short_run_s_milestones_lie_within_its_epochs():
    """Two epochs instead of 600: at a third, a half and two thirds, not all at once after one."""
    config = make_config(dataset="cifar10", epochs=2, lr=1.)
    assert config.milestones == pytest.approx((2 / 3, 1, 4 / 3))
    rates = [learning_rate(config, k / 12) for k in range(12)]           # six steps an epoch
    assert rates == pytest.approx([1] * 4 + [.1] * 2 + [.01] * 2 + [.001] * 4)
    assert make_config(dataset="cifar10", epochs=2, schedule="one-cycle").milestones == (1, 1, 1)


# ---- A trained network ---------------------------------------------------------------------------

def test_test_only_repeats_the_result(trained, cli):
    error = json.loads((trained / "result.json").read_text())["error"]
    done = cli(f"--resume {trained} --test-only")
    assert done.code == 0 and f"test error {error:.2f} %" in done.out and "10 images" in done.out
    assert_one_line(cli(f"--resume {trained} --test-only --dataset digits --test-images 20 "
                        "--train-images 64"), "other classes")


def test_test_only_says_where_within_an_epoch_a_run_stands(cli, place):
    stopped = run(place, FOLDER, "--save-every 0 --output-dir run", sabotage=[kill_at(3)])
    assert stopped.code == -9
    done = cli("--resume run --test-only")
    assert done.code == 0 and "0 epochs, 2 steps of the next" in done.out


def test_test_only_reads_training_images_where_it_needs_them(trained, cli, pictures):
    """Where they are what is tested, and to find one that can be read."""
    done = cli(f"--resume {trained} --test-only --hold-out")             # of 32 every tenth
    assert done.code == 0 and "3 images" in done.out
    assert "held-out error" in done.out and "test error" not in done.out
    shutil.copytree(pictures, "holes")
    for file in (f for name in ("ant", "bee") for f in Path("holes/train", name).iterdir()):
        file.write_text("no image")
    done = cli(f"--resume {trained} --test-only --data-path holes --unreadable skip")
    assert done.code == 0 and "10 images" in done.out


def test_predict(trained, cli, pictures):
    image = pictures / "test/bee/1.png"
    Image.open(image).convert("RGBA").save("clear.png")
    done = cli(f"--resume {trained} --predict {image} clear.png")
    first, second = (line.rpartition(": ")[2] for line in done.out.splitlines())
    lengths = [float(x) for x in re.findall(r"(?:ant|bee|cat) (\d\.\d+)", first)]
    assert done.code == 0 and len(lengths) == 3 and lengths == sorted(lengths, reverse=True)
    assert 0 <= lengths[-1] and lengths[0] <= 1 and first == second


def test_predict_a_folder_goes_on_after_an_image_that_cannot_be_read(trained, cli, pictures):
    folder = Path(shutil.copytree(pictures / "test/bee", "nest/mixed"))
    (folder / "text.png").write_text("no image")
    Image.new("1", (10001, 10000)).save(folder / "huge.png")
    (folder / "notes.txt").write_text("not looked at")
    done = cli(f"--resume {trained} --predict nest missing.png")
    assert_one_line(done, "3 of 8", code=1)
    bad = [line for line in done.out.splitlines() if "cannot read" in line]
    assert len(done.out.splitlines()) == 8 and len(bad) == 3 and "notes" not in done.out
    assert "missing.png: cannot read it (No such file or directory)" in bad
    assert any("text.png: cannot read it (cannot identify image" in line for line in bad)
    Path("empty").mkdir()
    assert_one_line(cli(f"--resume {trained} --predict empty"), "no images in empty")


def test_a_trained_network_in_another_program_says_what_predict_says(trained, cli, pictures):
    net, classes, transform = load(trained)
    image = pictures / "test/bee/1.png"
    with torch.no_grad():
        scores = net(transform(image))[0][0].tolist()
    said = cli(f"--resume {trained} --predict {image}").out
    assert classes == ["ant", "bee", "cat"] and not net.training
    for name, score in zip(classes, scores, strict=True):
        assert f"{name} {score:.3f}" in said
    state = state_of(trained)["data"]
    pixels = torch.tensor(np.array(Image.open(image))).permute(2, 0, 1) / 255
    want = (pixels - state["mean"].view(3, 1, 1)) / state["std"].view(3, 1, 1)
    with Image.open(image) as opened, open(image, "rb") as file:
        for each in (image, str(image), opened, file, np.array(opened), np.array(opened) / 255):
            torch.testing.assert_close(transform(each)[0], want)
        grey = opened.convert("L")
        torch.testing.assert_close(transform(np.array(grey)), transform(grey))
        opened.getpixel((0, 0))                           # and stays open


def test_load_leaves_the_other_program_s_settings_alone(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")                                # its own processes
    monkeypatch.setattr(runtime, "join_processes", lambda backend: pytest.fail("joined"))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: pytest.fail("changed"))
    net, _, _ = load(trained, device="meta", deterministic=True)
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_test_only_of_a_deterministic_run_is_one(trained, cli, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    assert cli(f"--resume {trained} --test-only --deterministic").code == 0 and asked == [True]


def test_the_readme_s_example_of_a_trained_network_runs(trained, cli):
    """But for the last line, which wants onnx; exporting to it is tested with the networks."""
    text = (HERE / "README.md").read_text()
    example, = (code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
                if "import load" in code)
    Path("runs").mkdir()
    Path("runs/digits-encapnet-small-0").symlink_to(trained)
    scope = {}
    exec(example[:example.index("torch.onnx.export")], scope)
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(scope["program"].module()(x)[0], scope["net"](x)[0])


def test_a_checkpoint_that_lacks_a_weight_does_not_fit(trained, cli):
    state = state_of(trained)
    state["net"].popitem()
    torch.save(state, "less.pt")
    assert_one_line(cli("--resume less.pt --test-only"), "does not fit")


# ---- A run that starts from another's weights ----------------------------------------------------

BEGUN = f"{FOLDER} --train-images 20 --epochs 0 --seed 5 --output-dir"   # before training


def weights(folder):
    return state_of(folder)["net"]


def test_init_starts_from_another_runs_weights(trained, cli):
    assert cli(BEGUN, "fresh").code == 0
    shutil.copytree(trained, "theirs")
    done = cli(BEGUN, "same --init theirs")
    assert done.code == 0 and "after 2 epochs\n" in done.out
    ours, theirs, fresh = map(weights, ("same", trained, "fresh"))
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not torch.equal(fresh["classes.weight"], ours["classes.weight"])
    results = [json.loads(Path(f, "result.json").read_text()) for f in ("same", "fresh")]
    assert results[0]["config"]["init"] == "theirs" and \
        len({config_key(Config(**line["config"])) for line in results}) == 2
    assert_one_line(cli(BEGUN, "same"), "init")           # a run without it is another
    shutil.rmtree("theirs")                                # what goes on needs it no more
    assert cli("--resume same --epochs 1").code == 0
    assert not torch.equal(weights("same")["classes.weight"], theirs["classes.weight"])


@pytest.mark.parametrize("classes", [("ant", "bee"), ("ant", "bee", "cow")])
def test_init_leaves_the_class_layer_alone_where_classes_are_others(classes, trained, cli,
                                                                    pictures):
    """As many classes with other names are other classes."""
    data = "-".join(classes)
    for split in ("train", "test"):
        for name, new in zip(("ant", "bee", "cat"), classes, strict=False):
            shutil.copytree(pictures / split / name, f"{data}/{split}/{new}")
    assert cli(BEGUN, f"fresh --data-path {data}").code == 0
    done = cli(BEGUN, f"new --data-path {data} --init {trained}")
    assert done.code == 0 and done.out.count("the class layer starts anew") == 1
    assert state_of("new")["data"]["classes"] == list(classes)
    ours, theirs, fresh = map(weights, ("new", trained, "fresh"))
    assert len(ours) > 20
    for name, t in ours.items():
        assert torch.equal(t, fresh[name] if name == "classes.weight" else theirs[name]), name


@pytest.mark.parametrize("words, culprit", [
    (f"{FOLDER} --set types=3", "size mismatch for"), ("--init nowhere", "nowhere"),
    ("--dataset folder --model cnn-same --set width=0.1", "Missing key"),
    ("--dataset folder --model encapnet-small", "size mismatch for")])
def test_init_from_what_does_not_fit_is_one_line(words, culprit, trained, cli):
    done = cli(f"--init {trained} --epochs 0 --output-dir run", words)
    ours = ("--init", "weights of encapnet-small types=2")
    assert_one_line(done, culprit, *(["there is no run"] if "nowhere" in words else ours))
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_compiled_run_and_a_plain_one_continue_each_other(cli, place):
    words = FOLDER + " --save-every 0 --set feedback=0"
    assert cli(words, "--compile --output-dir run").code == 0
    assert cli("--resume run --no-compile --epochs 2").code == 0
    assert cli("--resume run --compile --epochs 3").code == 0


# ---- Fuzz: no traceback ever reaches a user ------------------------------------------------------

FLAGS = [f for a in train.make_parser()._actions for f in a.option_strings
         if f not in ("-h", "--help", "--debug")]
WORDS = st.one_of(
    st.sampled_from(FLAGS), st.sampled_from([*DATASETS, *encapnet.MODELS, "none", "+", "++"]),
    st.sampled_from(["types=2", "types=x", "=", "depths=(", "a=" + "[" * 99, "cpu", "cuda:7", "",
                     "-", "--", "-1", "0", "1", "2", "1e99", "nan", "inf", "fast", "margin", "ce"]),
    st.text(max_size=5).filter(lambda text: "\0" not in text))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=6))
@example(["--set", "types=" + "9" * 5000])
@example(["--resume", "\0"])
@example(["\n"])
@example(["--model", "a\nb"])
def test_no_command_line_shows_a_traceback(cli, monkeypatch, words):
    def nothing(config):
        raise Problem("ran")
    monkeypatch.setattr(train, "fit", nothing)
    monkeypatch.setattr(bench, "bench_step", nothing)
    done = cli(*map(shlex.quote, words))
    assert done.code in (0, 1, 2) and "Traceback" not in done.err, (words, done)
    assert "unexpected" not in done.err and done.err.count("\n") == (done.code > 0), (words, done)
