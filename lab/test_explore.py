"""explore: its pictures, its attacks; the README's examples; how the rooms lie."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import encapnet
import lab
import train
from conftest import HERE, state_of
from lab import digits, explore, figures, fit, why
from lab.measure import spread
from lab.runtime import Problem

SMALL = "encapnet-small --set types=2 --set dims=(1,1,2,2) --set feedback=2"
MODELS = {"encapnet": SMALL, "again": f"{SMALL} --seed 1", "em": "capnet-em --set types=1",
          "cnn": "cnn-same --set width=0.1 --seed 5"}


@pytest.fixture(scope="module", autouse=True)
def one_typeface():
    """Digits are drawn in one typeface a split: sooner."""
    with pytest.MonkeyPatch.context() as patch:
        for split, name in (("train", "DejaVuSans"), ("test", "cmss10")):
            patch.setitem(digits.TYPEFACES, split, [name])
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny finished runs, name -> folder."""
    place, folders = tmp_path_factory.mktemp("explore"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(fit, "draw_run", lambda *run: None)
        for name, model in MODELS.items():
            flags = ("--train-images 32 --test-images 40 --batch-size 8 --epochs 1 --device cpu "
                     f"--output-dir {name} --model {model}")
            assert train.main(flags.split()) == 0
            folders[name] = place / name
    return folders


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(explore, "draw_digits", lambda n, train: digits.draw_digits(100, train))


def test_a_network_is_shown_test_images_as_it_was_in_training(runs, tmp_path):
    """At the scale that its checkpoint names, whatever the training images are today."""
    state = state_of(runs["cnn"])
    state["data"]["mean"] += 0.1
    state["data"]["std"] *= 2
    torch.save(state, tmp_path / "older.pt")
    run = explore.load(tmp_path / "older.pt")
    assert run.folder == tmp_path and explore.load(runs["cnn"]).folder == runs["cnn"]
    assert torch.equal(run.data.mean, state["data"]["mean"])
    assert torch.equal(run.data.std, state["data"]["std"])
    assert torch.equal(run.data.test.images, digits.draw_digits(40, train=False)[0])
    assert len(run.data.train) == 1 and run.config.train_images == 32    # read, and trained on


@pytest.mark.parametrize("name, panels", [("encapnet", [0, 1, 2]), ("em", [0])])
def test_explain_draws_the_panels_that_apply_and_numbers_them_without_a_gap(name, panels, runs,
                                                                           fewer, monkeypatch):
    drawn, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or (
        save(figure, path) if name == "encapnet" else None))           # one page is enough
    assert explore.main(["explain", str(runs[name])]) == 0
    assert name != "encapnet" or (runs[name] / "explain.png").read_bytes()[:4] == b"\x89PNG"
    titles = [explore.PANELS[k][0] for k in panels]
    numbers = json.loads((runs[name] / "explain.json").read_text())
    assert list(numbers) == ["run", "environment", *titles]
    assert [row._suptitle.get_text() for row in drawn[0].subfigs] == [
        f"{k}  {title}" for k, title in enumerate(titles, 1)]
    assert all(0 <= r <= 1 for r in numbers[titles[0]].values())


def test_coefficients_are_m1_of_the_master_and_m2_of_the_aide(runs):
    """Convolutions of which the bias is left: numbers known type by type, of 2 types."""
    run = explore.load(runs["encapnet"])
    layers = [m for m in run.net.modules() if isinstance(m, encapnet.CapConv)]
    for layer in layers:
        layer.from_v1.weight.zero_(), layer.from_v2.weight.zero_()
        layer.from_v1.bias.copy_(torch.tensor([1., 2, -3, 4]))         # m1 m2 of a type adjoin
    numbers = explore.draw_coefficients(run, Figure(layout="constrained"))
    assert len(numbers) == 4 and {label[:2] for label in numbers} == {"m1", "m2"}
    for label, found in numbers.items():
        assert ("master" in label) == label.startswith("m1") != ("aide" in label)
        expected = (-1, 2, 0.5) if "m1" in label else (3, 1, 0)        # of 1 and -3, of 2 and 4
        assert tuple(found.values()) == pytest.approx(expected, rel=1e-3), label


def test_the_feedback_panel_correlates_each_units_lower_image_with_the_generated_one(runs):
    """Two units a module: from its output to its input, and to what its type II layers take."""
    run = explore.load(runs["encapnet"])
    for module in run.net.modules():                                   # no image is constant
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.fill_(0.5)
    numbers = explore.draw_feedback(run, Figure(layout="constrained"))
    net, test = run.net, run.data.test
    u, pairs = net.stem((test.images / 255 - run.data.mean.view(3, 1, 1))
                        / run.data.std.view(3, 1, 1)), []
    for module in net.blocks:
        w, v = module(u)
        pairs, u = [*pairs, (u, v), (w, v)], v
    assert len(pairs) == len(net.units) == len(numbers["all channels"]) == 6

    def lengths(image):
        return np.linalg.norm(image.reshape(len(image), 2, -1, *image.shape[2:]), axis=2).mean(1)

    def correlation(a, b):
        return np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)])
    for k, (unit, (low, high)) in enumerate(zip(net.units, pairs, strict=True)):
        real, made = (z.double().numpy() for z in (low, unit.generate(high, low.shape[-2:])))
        expected = {"all channels": correlation(real, made),
                    "capsule lengths": correlation(lengths(real), lengths(made)),
                    "lengths, other image": correlation(lengths(real),
                                                        np.roll(lengths(made), 1, 0))}
        z = unit.extract(low).double().numpy()
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        alive = np.square(z).sum(1).mean()
        expected["told apart"] = 1 - np.square(z.mean(0)).sum() / alive if alive else 0
        found = {name: values[f"unit {k + 1}"] for name, values in numbers.items()}
        assert found == pytest.approx(expected, abs=2e-3)


def test_the_pose_panel_tells_what_the_features_tell(runs, monkeypatch):
    """Features that are some of the poses: those are told wholly, others not."""
    poses = digits.draw_digits(600, train=False)[2].double()
    monkeypatch.setattr(explore, "features", lambda run, x, labels: torch.cat(
        [poses[:, [0, 2]], torch.randn(600, 14).double()], 1))
    figure = Figure(layout="constrained")
    told = explore.draw_pose(explore.load(runs["encapnet"]), figure, 600)
    assert all((share > 0.99) == (factor in ("x", "rotation")) for factor, share in told.items())
    assert all(share > 0.99 or share < 0.7 for share in told.values())
    alone, bars, _ = figure.axes
    assert [label.get_text() for label in alone.get_yticklabels()] == list(told)
    shown = alone.images[0].get_array()
    assert shown.argmax(1)[[0, 2]].tolist() == [0, 1] and shown[[0, 2], [0, 1]].min() > 0.99
    assert [label.get_text() for label in bars.get_xticklabels()] == list(told)
    assert [bar.get_height() for bar in bars.patches] == list(told.values())


@pytest.mark.parametrize("n", [7, 40, 100])
def test_images_looked_at_are_test_images_spread_over_all_of_them(n, runs):
    run = explore.load(runs["encapnet"])
    images, labels = spread(run, n)
    assert len(images) == len(labels) == min(n, 40)
    place = [next(k for k, image in enumerate(run.data.test.images) if torch.equal(x, image / 255))
             for x in images]
    assert labels.tolist() == run.data.test.labels[place].tolist()
    steps = {b - a for a, b in zip(place[:-1], place[1:], strict=True)}
    assert (place[0], place[-1]) == (0, 39) and max(steps) - min(steps) <= 1 <= min(steps)


def test_match_known_answers():
    a = torch.randn(5, 2, 8, 8)
    assert explore.match(a, 3 * a + 2) == pytest.approx(1)
    assert explore.match(a, -a) == pytest.approx(-1)
    assert abs(explore.match(a, a.roll(1, 0))) < 0.3


def test_the_capsule_looked_at_is_the_right_class_s(runs):
    for name in ("encapnet", "em"):
        run = explore.load(runs[name])
        x, labels = spread(run, 40)
        v = explore.features(run, x, labels).float()
        v = encapnet.squash(v) if name == "em" else v                  # a pose is not squashed
        torch.testing.assert_close(v.norm(dim=1), explore.scores(run, x)[range(40), labels])


def test_r_squared_known_answers():
    z = torch.randn(4000, 5, dtype=torch.double)
    z[:, 4] = 0                                                        # a dimension never used
    labels = torch.arange(4000) % 2
    plain, square = z[:, 0] - 2 * z[:, 1] + 7 * labels, z[:, 0] ** 2
    together, alone = explore.r_squared(z, torch.stack([plain, square], 1), labels)
    assert together[0] > 1 - 1e-9 and together[1] < 0.02
    assert alone[0, 1].item() == pytest.approx(0.8, abs=0.05) and alone[:, 4].eq(0).all()


def test_changes_are_the_ones_named():
    x = torch.rand(6, 3, 12, 12)
    def change(kind, strength):
        return explore.changed(x, kind, strength, torch.Generator().manual_seed(0))
    for kind in explore.CHANGES:
        torch.testing.assert_close(change(kind, 0), x)
    torch.testing.assert_close(change("rotation", 180), x.flip(2, 3))
    quarter = change("rotation", 90)
    turns = [[image.allclose(before.rot90(k, (1, 2)), atol=1e-5) for k in (1, 3)]
             for image, before in zip(quarter, x, strict=True)]
    assert all(map(any, turns)) and {turn.index(True) for turn in turns} == {0, 1}
    moved, inner = change("shift", 2), (slice(None), slice(3, -3), slice(3, -3))
    for image, before in zip(moved, x, strict=True):
        near = [image[inner].allclose(before.roll((a, b), (1, 2))[inner], atol=1e-5)
                for a in (-2, 2) for b in (-2, 2)]
        assert sum(near) == 1
    ramp = torch.arange(12.).expand(6, 1, 12, 12) - 5.5                # twice or half as steep
    slope = explore.changed(ramp, "scale", 1, torch.Generator().manual_seed(0))[:, 0, 6, 5:7].diff()
    assert set(slope.flatten().tolist()) <= {0.5, 2.0}
    column = torch.zeros(6, 1, 12, 12).index_fill_(3, torch.tensor([5, 6]), 1.)  # leans, rows stay
    leaning = explore.changed(column, "shear", 0.5, torch.Generator().manual_seed(0))
    centre = (leaning * torch.arange(12.)).sum(3) / leaning.sum(3)
    assert set(centre[:, 0].diff(dim=1).mul(2).round().flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(leaning.sum(3), column.sum(3))
    assert change("noise", 0.1).sub(x).abs().mean() == pytest.approx(0.08, abs=0.03)


def run_of(function):
    """A run whose network is a function of the image, and which notes what it is shown."""
    seen = []

    class Net(torch.nn.Module):
        logits = True

        def forward(self, x):
            seen.append(x.detach())
            return function(x.flatten(1)), torch.zeros(())
    as_it_is = SimpleNamespace(mean=torch.zeros(1), std=torch.ones(1))
    plain = SimpleNamespace(channels_last=False, amp=False)
    return SimpleNamespace(net=Net(), config=plain, data=as_it_is, seen=seen)


@pytest.mark.parametrize("steps, restarts", [(1, 1), (10, 2)])
def test_attacks_on_a_linear_network_are_exact(steps, restarts):
    """The margin of linear scores can move by eps |w|_1 and no further; a wrong image is fooled."""
    x, eps = 0.4 + 0.2 * torch.rand(200, 3, 2, 2), 0.02
    weight = torch.randn(12, 2)
    weight -= weight.mean(0)                                           # both classes occur
    run = run_of(lambda x: x @ weight)
    scores = explore.scores(run, x)
    labels = scores.argmax(1)
    labels[:20] = 1 - labels[:20]
    lead = scores.gather(1, labels[:, None])[:, 0] - scores.gather(1, 1 - labels[:, None])[:, 0]
    reach = eps * (weight[:, 0] - weight[:, 1]).abs().sum()
    run.seen.clear()
    found = explore.attack(run, x, labels, explore.margin, eps, steps, restarts, torch.Generator())
    clear = (lead - reach).abs() > 1e-4
    assert torch.equal(found[clear], (lead < reach)[clear])
    assert found[:20].all() and found[20:].any() and not found.all()
    assert all((look - x).abs().max() <= eps + 1e-6 for look in run.seen)


def test_an_image_that_is_wrong_on_the_way_is_fooled(monkeypatch):
    """Scores of one number that err between 0.52 and 0.54 only: the ascent goes past it."""
    run = run_of(lambda z: torch.cat([z, 1 - z + 2 * ((z > 0.52) & (z < 0.54))], 1))
    monkeypatch.setattr(explore, "slope", lambda run, x, labels, objective: torch.ones_like(x))
    x = torch.full((1, 1, 1, 1), 0.51)
    arguments = (run, x, torch.zeros(1).long(), explore.margin)
    assert not explore.attack(*arguments, 0.1, 1, 1, torch.Generator()).any()      # steps over
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, 0.5))
    assert explore.attack(*arguments, 0.1, 10, 1, torch.Generator()).all()
    x.fill_(0.53)                                                      # wrong, but not later
    assert explore.attack(*arguments, 0.1, 1, 1, torch.Generator()).all()


def test_unsquashed_undoes_squash_where_its_gradient_vanishes():
    s = (torch.tensor([1e-2, 1., 50.])[:, None] * torch.tensor([.6, .8])).requires_grad_()
    length = encapnet.squash(s).norm(dim=1)
    opened = explore.unsquashed(length)
    torch.testing.assert_close(opened, 2 * s.norm(dim=1).log(), atol=1e-3, rtol=1e-3)
    flat, = torch.autograd.grad(length.sum(), s, retain_graph=True)
    steep, = torch.autograd.grad(opened.sum(), s)
    assert flat[2].norm() < 1e-4 and steep[2].norm() == pytest.approx(2 / 50, rel=0.01)


def test_the_margin_sees_what_the_loss_hides(runs):
    run = explore.load(runs["encapnet"])
    scores, labels = torch.rand(7, 10), torch.arange(7)
    torch.testing.assert_close(explore.loss(run, scores, labels),
                               7 * encapnet.margin_loss(scores, labels))
    done = (0.05 + 0.9 * F.one_hot(labels, 10)).requires_grad_()       # right, so without loss
    gradient = [torch.autograd.grad(climb(run, done, labels), done)[0].abs().amax(1)
                for climb in (explore.loss, explore.margin)]
    assert gradient[0].eq(0).all() and gradient[1].gt(1).all()
    opened = 2 * (0.5 / (1 - 0.5) * torch.ones(1)).sqrt().log()        # |s| of a length of one half
    even = torch.full((1, 10), 0.5)
    even[0, 3] = 0.9
    wanted = (opened - 2 * torch.tensor(9.).sqrt().log()).item()
    assert explore.margin(run, even, torch.tensor([3])).item() == pytest.approx(wanted, abs=1e-4)


def test_robustness_of_seeds_side_by_side(runs, capsys, monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.update({path: figure}))
    monkeypatch.chdir(tmp_path)
    small = "--images 50 --steps 1 --restarts 1 --eps 4 64 --device cpu".split()
    folders = [runs[name] for name in ("encapnet", "again", "cnn")]
    assert explore.main(["robustness", *map(str, folders), *small]) == 0
    told = [block.splitlines() for block in capsys.readouterr().out.split("error in %\n")]
    lines = [json.loads(line) for line in Path("runs/results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 5] and lines[0]["images"] == 40
    for folder, line, block in zip(folders, lines, told[1:], strict=True):
        errors = line["errors"]
        tested = json.loads((folder / "result.json").read_text())["error"]
        assert errors["clean"]["0"] == pytest.approx(tested)           # the same 40 images
        assert set(explore.CHANGES) < set(errors)
        for eps in ("4", "64"):
            single = [errors[a][eps] for a in ("FGSM", "PGD", "PGD margin")]
            assert errors["clean"]["0"] <= max(single) <= errors["any attack"][eps] <= 100
        said = dict(re.split("  +", row.strip(), maxsplit=1) for row in block if row[:2] == "  ")
        assert said == {test: ", ".join(f"{s}: {error:.1f}" for s, error in found.items())
                        for test, found in errors.items()}
    (path, figure), = drawn.items()
    assert path == folders[0] / "robustness.png"
    panels = {axis.get_title(): axis for axis in figure.axes}
    clean = np.array([line["errors"]["clean"]["0"] for line in lines])
    for test, axis in panels.items():                                  # from no change at all on
        changes = lines[0]["errors"][test]
        points = np.array([clean, *([line["errors"][test][s] for line in lines] for s in changes)])
        means = points[:, :2].mean(1), points[:, 2]
        for curve, mean in zip(axis.containers, means, strict=True):
            np.testing.assert_allclose(curve.lines[0].get_ydata(orig=False), mean)
            np.testing.assert_allclose(curve.lines[0].get_xdata(orig=False),
                                       [0, *map(float, changes)])
        top = axis.containers[0].lines[1][1].get_ydata(orig=False)     # of the bars: the sd
        np.testing.assert_allclose(top - means[0], np.abs(np.diff(points[:, :2])[:, 0]) / 2 ** 0.5)
        names = [curve.get_label() for curve in axis.containers]
        assert names[0].endswith("dims=(1, 1, 2, 2) feedback=2")
        assert names[1] == "cnn-same width=0.1 loss=ce"
    assert len(panels) == 8


def test_runs_of_other_settings_are_not_seeds_of_one(runs, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explore, "measure", lambda *given: {"clean": {"0": 1.0}})
    monkeypatch.setattr(explore, "draw_robustness", lambda groups, path: drawn.append(groups))
    first, second = (explore.load(runs[name]) for name in ("encapnet", "again"))
    others = [replace(second, config=replace(second.config, **change))
              for change in (dict(lam=5.0), dict(epochs=9))]
    explore.robustness([first, second, *others])
    name = explore.name_of(first)
    assert {label: len(seeds) for label, seeds in drawn[0].items()} == {
        name: 2, f"{name} lam=5.0": 1, f"{name} epochs=9": 1}


def test_a_network_that_is_always_wrong_is_wrong_under_attack(runs):
    run = explore.load(runs["encapnet"])
    x, labels = spread(run, 40)
    run.data.test.labels = (1 + explore.scores(run, x).argmax(1)) % 10
    errors = explore.measure(run, 40, 1, 1, (4,))
    assert errors["clean"]["0"] == errors["any attack"]["4"] == 100


def test_explain_says_why_it_cannot_draw(runs):
    with pytest.raises(Problem, match="a page needs capsules of digits"):
        explore.explain(explore.load(runs["cnn"]))


@pytest.mark.parametrize("arguments, words", [
    ("explain nowhere", "no checkpoint nowhere"), ("explain", "required: RUN"),
    ("imagine RUN", "invalid choice"), ("robustness RUN --steps 0", "at least 1")])
def test_bad_input_is_one_line(arguments, words, runs, capsys):
    given = [str(runs["cnn"]) if word == "RUN" else word for word in arguments.split()]
    assert explore.main(given) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("lab.explore: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("room", [explore, why])
def test_help_says_how_it_is_called_and_what_each_argument_does(room, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as end:
        room.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith(f"usage: python -m {room.__name__} ")
    assert len(out.splitlines()[2]) > 30                               # what it is for
    named = re.findall(r"(?m)^ {2}([-{]\S.*|RUN.*)", out)
    assert len(named) >= 3 and all(re.search(r"\S  +\S", line) for line in named), named


def test_the_list_of_rooms_is_complete_and_every_import_runs_to_its_right():
    chain = lab.__doc__.split("\n\n")[1].split("->")
    place = {room: k for k, rooms in enumerate(chain) for room in re.findall(r"\w+", rooms)}
    files = [HERE / "train.py", *(file for file in (HERE / "lab").glob("*.py")
                                  if not file.stem.startswith(("test_", "__")))]
    assert sorted(place) == sorted(file.stem for file in files)
    for file in files:
        found = re.findall(r"^ *from lab(?:\.(\w+) import| import (.+))", file.read_text(), re.M)
        for room in re.findall(r"\w+", " ".join(map(" ".join, found))):
            assert place[file.stem] < place[room], (file.stem, room)


@pytest.mark.parametrize("name, answer", [("FeedbackUnit", "loss"),
                                          ("sinkhorn_divergence", "divergence")])
def test_programs_of_the_exercises_run(name, answer, tmp_path, monkeypatch):
    text = (HERE / "EXERCISES.md").read_text()
    examples = [code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
                if f"import {name}" in code]
    assert len(examples) == 1
    if name == "FeedbackUnit":
        assert sum(bool(line.strip()) for line in examples[0].splitlines()) <= 11    # + import
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope = {}
    exec(examples[0].replace("range(91)", "range(46)"), scope)         # half way tells enough
    assert math.isfinite(scope[answer].detach())
    if name == "sinkhorn_divergence":
        assert scope[answer] < 0.05 and (tmp_path / "cloud.png").exists()
