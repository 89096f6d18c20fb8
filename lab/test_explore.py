"""explore: its pictures, its attacks; the README's examples; how the modules import one another."""
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import encapnet
import lab
import train
from conftest import HERE, state_of
from lab import digits, explore, figures, fit, measure, why
from lab.runtime import Problem
from lab.use import load_run

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
    run = load_run(tmp_path / "older.pt")
    assert run.folder == tmp_path and load_run(runs["cnn"]).folder == runs["cnn"]
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


@pytest.mark.parametrize("n, few", [(60, [0, 20, 40]), (5, [0, 2, 4]), (2, [0, 1])])
def test_images_shown_are_spread_over_those_looked_at(n, few):
    assert explore.some(torch.arange(n), 3).tolist() == few


def test_coefficients_are_m1_of_the_master_and_m2_of_the_aide(runs):
    """Convolutions of which the bias is left: numbers known type by type, of 2 types."""
    run = load_run(runs["encapnet"])
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


def test_the_feedback_panel_correlates_each_units_lower_image_with_the_generated_one(
        runs, monkeypatch):
    """Two units a module: from its output to its input, and to what its type II layers take."""
    maps = {}
    monkeypatch.setattr(explore, "draw_maps", lambda axis, images, title, columns: maps.update(
        {title: images.double().numpy()}))
    run = load_run(runs["encapnet"])
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
    assert len(pairs) == len(net.units) == 6

    def lengths(image):
        return np.linalg.norm(image.reshape(len(image), 2, -1, *image.shape[2:]), axis=2).mean(1)

    def correlation(a, b):
        return np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)])
    for k, (unit, (low, high)) in enumerate(zip(net.units, pairs, strict=True)):
        real, made = (z.double().numpy() for z in (low, unit.generate(high, low.shape[-2:])))
        expected = {"correlation, all channels": correlation(real, made),
                    "correlation, capsule lengths": correlation(lengths(real), lengths(made)),
                    "lengths, of another image": correlation(lengths(real),
                                                           np.roll(lengths(made), 1, 0))}
        z = unit.extract(low).double().numpy()
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        alive = np.square(z).sum(1).mean()
        expected["variance between images"] = 1 - np.square(z.mean(0)).sum() / alive if alive else 0
        if k == 0:                                        # drawn: the lower layer, the generated
            shown = [explore.some(lengths(z), 4) for z in (real, made)]
            np.testing.assert_allclose(list(maps.values()), shown, atol=1e-5)
            assert [title.split()[0] for title in maps] == ["lower", "the"]
        found = {name: values[f"unit {k + 1}"] for name, values in numbers.items()}
        assert found == pytest.approx(expected, abs=2e-3)


def test_the_pose_panel_tells_what_the_features_tell(runs, monkeypatch):
    """Features that are some of the poses: those are told wholly, others not."""
    poses = digits.draw_digits(600, train=False)[2].double()
    monkeypatch.setattr(measure, "true_capsules", lambda run, x, labels: torch.cat(
        [poses[:, [0, 2]], torch.randn(600, 14).double()], 1))
    figure = Figure(layout="constrained")
    told = explore.draw_pose(load_run(runs["encapnet"]), figure, 600)
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
    run = load_run(runs["encapnet"])
    images, labels = measure.spread_images(run, n)
    assert len(images) == len(labels) == min(n, 40)
    place = [next(k for k, image in enumerate(run.data.test.images) if torch.equal(x, image / 255))
             for x in images]
    assert labels.tolist() == run.data.test.labels[place].tolist()
    steps = {b - a for a, b in zip(place[:-1], place[1:], strict=True)}
    assert (place[0], place[-1]) == (0, 39) and max(steps) - min(steps) <= 1 <= min(steps)


def test_variance_between_samples_of_known_features():
    share = measure.variance_between_samples
    unit = encapnet.FeedbackUnit(4, 4, types=1, stride=1, extractor=False)
    for n in (2, 5, 16):
        apart = torch.eye(16)[:n].view(n, 4, 2, 2) * torch.rand(n, 1, 1, 1).add(.1)
        assert share(unit, apart).item() == pytest.approx(1 - 1 / n)
        assert share(unit, torch.rand(1, 4, 2, 2).expand(n, -1, -1, -1)).item() == \
            pytest.approx(0, abs=1e-6)
        assert share(unit, torch.zeros(n, 4, 2, 2)).item() == 0
    two = torch.eye(16)[[0, 0, 0, 1]].view(4, 4, 2, 2)    # three alike: 1 - (9 + 1) / 16
    assert share(unit, two).item() == pytest.approx(6 / 16)


def test_correlation_known_answers():
    a = torch.randn(5, 2, 8, 8)
    assert measure.correlation(a, 3 * a + 2) == pytest.approx(1)
    assert measure.correlation(a, -a) == pytest.approx(-1)
    assert abs(measure.correlation(a, a.roll(1, 0))) < 0.3


def test_the_capsule_looked_at_is_the_true_class_s(runs):
    for name in ("encapnet", "em"):
        run = load_run(runs[name])
        x, labels = measure.spread_images(run, 40)
        v = measure.true_capsules(run, x, labels).float()
        v = encapnet.squash(v) if name == "em" else v                  # a pose is not squashed
        torch.testing.assert_close(v.norm(dim=1), measure.class_scores(run, x)[range(40), labels])


def test_explained_variance_known_answers():
    z = torch.randn(4000, 5, dtype=torch.double)
    z[:, 4] = 0                                                        # a dimension never used
    labels = torch.arange(4000) % 2
    plain, square = z[:, 0] - 2 * z[:, 1] + 7 * labels, z[:, 0] ** 2
    together, alone = measure.explained_variance(z, torch.stack([plain, square], 1), labels)
    assert together[0] > 1 - 1e-9 and together[1] < 0.02
    assert alone[0, 1].item() == pytest.approx(0.8, abs=0.05) and alone[:, 4].eq(0).all()
    noise = measure.explained_variance(torch.randn(80, 39).double(), torch.randn(80, 3),
                                       torch.zeros(80))[0]
    assert noise.eq(0).all()                                           # 40 images are fitted wholly


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


# ---- Attacks -------------------------------------------------------------------------------------

def run_of(function, logits, images, labels):
    """A run whose network is a function of the image, on images (n, C, H, W) in [0, 1]."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.weight = logits, torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            assert not self.training
            return function(x.flatten(1)), torch.zeros(())

    class Held:
        def __len__(self):
            return len(images)

        def batches(self, chunks, device):
            return ((images[chunk], labels[chunk], chunk) for chunk in chunks)
    data = SimpleNamespace(mean=torch.zeros(1), std=torch.ones(1), side=images.shape[-1],
                           classes=["a", "b"], test=Held())
    plain = SimpleNamespace(channels_last=False, amp=False)
    return SimpleNamespace(net=Net().eval(), config=plain, data=data, device=torch.device("cpu"))


needs_attacks = pytest.mark.skipif(not explore.importlib.util.find_spec("torchattacks"),
                                   reason="torchattacks is not installed")


@needs_attacks
@pytest.mark.parametrize("logits", [True, False])
def test_a_network_of_known_margin_breaks_at_its_known_eps_and_not_below(logits, monkeypatch):
    """Linear logits, or lengths that are their sigmoid: within eps the margin moves by eps |w|_1.

    Ten images with a margin of 6.5/255, ten of 20/255, five that are wrong from the start.
    """
    monkeypatch.setattr(measure, "views", lambda x, *_: iter([x]))
    w = torch.tensor([3., -1, 2, -4, 1, 1, 5, -2, 1, -3, 1, 2])
    x = (0.45 + 0.1 * torch.rand(25, 3, 2, 2)).double()
    eps = torch.tensor([6.5] * 10 + [20] * 10 + [-5] * 5).double() / 255
    lead = x.flatten(1) @ w.double()
    labels = torch.arange(25) % 2                                      # 0: the lead is to be > 0
    sign = 1 - 2 * labels
    x += ((sign * eps * w.abs().sum() - lead) / w.square().sum())[:, None, None, None] * \
        w.view(3, 2, 2)
    assert 20.1 / 255 < x.min() and x.max() < 1 - 20.1 / 255           # no border is met

    def function(z):
        score = 20 * z @ w / w.abs().sum()
        z = torch.stack([score / 2, -score / 2], 1)
        return z if logits else z.sigmoid()
    run = run_of(function, logits, x.float(), labels)
    found = explore.errors_of(run, 25, [4, 8, 16, 19.95, 20.05])
    assert found["clean"] == {"0": 20}
    for attack in ("FGSM", "PGD", "APGD"):
        assert found[attack] == {"4": 20, "8": 60, "16": 60, "19.95": 60, "20.05": 100}, attack


@needs_attacks
def test_attacks_stay_within_eps_and_within_the_pixels_range():
    x = torch.rand(20, 1, 3, 3).round(decimals=1)                      # some at the border
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 4)).eval()
    labels = net(x).argmax(1)
    tools = explore.attacks(net, 0.1, 4)
    assert list(map(len, tools.values())) == [1, 1, 2]
    assert len(explore.attacks(net, 0.1, 2)["APGD"]) == 1              # no third class to divide by
    for name, attack in ((name, attack) for name, attacks in tools.items() for attack in attacks):
        seen = attack(x, labels)
        assert 0 <= seen.min() and seen.max() <= 1 and (seen - x).abs().max() <= 0.1 + 1e-6, name
        assert (seen - x).abs().max() > 0.09


def test_logits_of_lengths_undo_squash_where_its_gradient_vanishes():
    s = (torch.tensor([1e-2, 1., 50.])[:, None] * torch.tensor([.6, .8])).requires_grad_()
    length = encapnet.squash(s).norm(dim=1)
    run = run_of(lambda x: length[None], False, torch.zeros(1, 1, 1, 1), torch.zeros(1).long())
    opened = explore.Attacked(run)(torch.zeros(1, 1, 1, 1))[0]
    torch.testing.assert_close(opened, 2 * s.norm(dim=1).log(), atol=1e-3, rtol=1e-3)
    flat, = torch.autograd.grad(length.sum(), s, retain_graph=True)
    steep, = torch.autograd.grad(opened.sum(), s)
    assert flat[2].norm() < 1e-4 and steep[2].norm() == pytest.approx(2 / 50, rel=0.01)


@pytest.fixture
def unattacked(monkeypatch):
    """Attacks that turn an image upside down from 4, 8, 16 of 255 on; changes that do, but noise
    and the smallest strengths."""
    def attacks(model, eps, classes):
        def turn(least):
            return lambda x, labels: x.flip(2) if eps > (least - 0.1) / 255 else x
        return {"FGSM": [turn(4)], "PGD": [turn(8), turn(999)], "APGD": [turn(16), turn(16)]}

    def changed(x, kind, strength, generator):
        return x.flip(2) if kind != "noise" and strength > explore.CHANGES[kind][1][0] else x
    monkeypatch.setattr(explore, "attacks", attacks)
    monkeypatch.setattr(explore, "changed", changed)
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(__spec__=True))


def test_errors_are_those_of_the_changed_images_and_are_told_at_once(runs, unattacked, monkeypatch,
                                                                    tmp_path, capsys):
    """Of a network that answers by whether the top is brighter than the bottom."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    run = load_run(runs["cnn"])
    images = run.data.test.images.float()
    brighter = images[:, :, :16].mean((1, 2, 3)) > images[:, :, 16:].mean((1, 2, 3))
    labels = brighter.long()
    labels[:10] = 1 - labels[:10]                                      # a quarter is wrong
    run.data = replace(run.data, test=replace(run.data.test, labels=labels))
    said = []

    def answer(run, x):
        said.append(capsys.readouterr().out.count("\n"))
        top = x[:, :, :16].mean((1, 2, 3)) > x[:, :, 16:].mean((1, 2, 3))
        return torch.nn.functional.one_hot(top.long(), 10).float()
    monkeypatch.setattr(measure, "class_scores", answer)
    explore.robustness([run], 100, [4.0, 8.0])
    line, = map(json.loads, Path("runs/results.jsonl").read_text().splitlines())
    errors = line["errors"]
    assert errors["clean"] == {"0": 25} and line["images"] == 40
    assert errors["FGSM"] == {"4": 100, "8": 100} and errors["APGD"] == {"4": 25, "8": 25}
    assert errors["PGD"] == {"4": 25, "8": 100}                        # wrong before stays wrong
    for kind, (_, strengths) in explore.CHANGES.items():
        turned = 25 if kind == "noise" else 75
        assert errors[kind] == {f"{s:g}": turned if k else 25 for k, s in enumerate(strengths)}
    assert max(said) <= 2 and sum(said) >= 1 + 20 + 6                  # each when it is known


def test_a_robustness_figure_shows_seeds_as_one_line_and_models_apart(monkeypatch, tmp_path):
    """Means 20 and 60 of two seeds, their sd, and one of another model; strengths as ticks."""
    drawn = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.update({path: figure}))
    tests = [*explore.CHANGES, "FGSM", "PGD", "APGD"]

    def seed(k, clean):
        return {"clean": {"0": clean},
                **{test: {"4": 10. * n + k, "127.5": 90. + k} for n, test in enumerate(tests)}}
    groups = {"net": [seed(0, 1.), seed(4, 3.)], "other": [seed(7, 5.)]}
    explore.draw_robustness(groups, tmp_path / "x.png")
    figure, = drawn.values()
    assert [axis.get_title() for axis in figure.axes] == tests
    for n, axis in enumerate(figure.axes):
        first, second = axis.containers
        assert first.lines[0].get_ydata(orig=False).tolist() == [2, 10 * n + 2, 92]
        assert second.lines[0].get_ydata(orig=False).tolist() == [5, 10 * n + 7, 97]
        top = first.lines[1][1].get_ydata(orig=False)                  # of the bars
        np.testing.assert_allclose(top, [2 + 2 ** .5, 10 * n + 2 + 8 ** .5, 92 + 8 ** .5])
        assert [c.get_label() for c in axis.containers] == ["net", "other"]
        ticks = [(tick.get_position()[0], tick.get_text()) for tick in axis.get_xticklabels()]
        assert ticks == [(0, "0"), (1, "4"), (2, "127.5")]
        assert first.lines[0].get_xdata(orig=False).tolist() == [0, 1, 2]


def test_runs_of_other_settings_are_not_seeds_of_one(runs, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explore, "errors_of", lambda *given: {"clean": {"0": 1.0}})
    monkeypatch.setattr(explore, "draw_robustness", lambda *given: drawn.append(given))
    first, second = (load_run(runs[name]) for name in ("encapnet", "again"))
    others = [replace(second, config=replace(second.config, **change))
              for change in (dict(lam=5.0), dict(epochs=9))]
    explore.robustness([first, second, *others], 5, [4])
    name = explore.name_of(first)
    (groups, path), = drawn
    assert path == runs["encapnet"] / "robustness.png"
    assert {label: len(seeds) for label, seeds in groups.items()} == {
        name: 2, f"{name} lam=5.0": 1, f"{name} epochs=9": 1}
    lines = [json.loads(line) for line in Path("runs/results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 1, 1]
    usual = first.config.lam
    assert [line["training"]["lam"] for line in lines] == [usual, usual, 5, usual]


@needs_attacks
def test_robustness_from_the_command_line(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explore.attacks, "__defaults__", (1,))         # steps
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    flags = "--images 50 --eps 16 --device cpu".split()
    assert explore.main(["robustness", str(runs["encapnet"]), *flags]) == 0
    line, = map(json.loads, Path("runs/results.jsonl").read_text().splitlines())
    tested = json.loads((runs["encapnet"] / "result.json").read_text())["error"]
    assert line["errors"]["clean"]["0"] == pytest.approx(tested)       # the same 40 images
    assert line["images"] == 40 and list(line["errors"]["APGD"]) == ["16"]


def test_robustness_without_torchattacks_is_one_line(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    assert explore.main(["robustness", str(runs["cnn"])]) == 2
    err = capsys.readouterr().err
    assert "pip install torchattacks" in err and err.count("\n") == 1


def test_explain_says_why_it_cannot_draw(runs):
    with pytest.raises(Problem, match="a page needs capsules of digits"):
        explore.explain(load_run(runs["cnn"]))


@pytest.mark.parametrize("arguments, words", [
    ("explain nowhere", "there is no run nowhere"), ("explain", "required: RUN"),
    ("imagine RUN", "invalid choice"), ("robustness RUN --images 0", "at least 1")])
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
