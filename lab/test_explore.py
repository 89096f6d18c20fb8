"""explore: its pictures, its attacks, and the README's examples."""
import dataclasses
import json
import math
import re
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import encapnet
import train
from conftest import HERE, agreement_by_hand
from lab import digits, explore, fit
from lab.config import make_config
from lab.fit import make_model
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
    monkeypatch.setattr(explore, "DRAWN", 100)


@pytest.mark.parametrize("name, parts", [("encapnet", "1235"), ("em", "134"), ("cnn", "1")])
def test_explain_draws_the_parts_that_apply_and_says_what_it_left_out(name, parts, runs, fewer,
                                                                      monkeypatch):
    if name != "encapnet":                                             # one page is enough
        monkeypatch.setattr(explore, "save_figure", lambda figure, path: None)
    beside = [] if name == "cnn" else ["--beside", str(runs["cnn"])]
    assert explore.main(["explain", str(runs[name]), *beside]) == 0
    assert name != "encapnet" or (runs[name] / "explain.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((runs[name] / "explain.json").read_text())
    assert "".join(key[0] for key in numbers if key[0].isdigit()) == parts
    left_out = re.findall(r"Left out: (\d)", "\n".join(numbers["notes"]))
    assert sorted([*parts, *left_out]) == list("12345")
    poses = numbers[explore.PARTS[0][0]]
    assert len(poses) == (2 if name == "cnn" else 3)                   # the CNN stands beside
    assert all(r <= 1 for fit in poses.values() for r in fit.values())


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


def test_polarisation_is_the_agreement_before_and_after_training(runs):
    run, seen = explore.load(runs["em"]), []
    numbers = explore.draw_polarisation(run, Figure(layout="constrained"))
    x = (run.data.test.images / 255 - run.data.mean.view(3, 1, 1)) / run.data.std.view(3, 1, 1)
    run.net.routed[1].register_forward_hook(lambda layer, given, out: seen.append((given[0], out)))
    run.net(x)
    u, (pose, _) = seen[0]
    percent, length = agreement_by_hand(run.net.routed[1], u, pose, run.data.test.labels)
    np.testing.assert_allclose(numbers["trained"]["percent"], percent, atol=0.2)
    np.testing.assert_allclose(numbers["trained"]["length"], length, rtol=0.05)
    assert numbers["untrained"] != numbers["trained"]


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


def test_the_pose_panel_tells_what_each_runs_features_tell(runs, monkeypatch):
    """Features that are some of the poses: those are told wholly, others not; no two runs mixed."""
    monkeypatch.setattr(explore, "DRAWN", 600)
    run, cnn = (explore.load(runs[name]) for name in ("encapnet", "cnn"))
    poses = run.digits(600)[2].double()
    known = {id(run.net): [0, 2], id(cnn.net): [1, 4]}                 # else: scale
    monkeypatch.setattr(explore, "features", lambda r, x, labels: torch.cat(
        [poses[:, known.get(id(r.net), [3])], torch.randn(600, 14).double()], 1))
    numbers = explore.draw_pose(run, Figure(layout="constrained"), cnn)
    told = {name: {factor for factor, share in found.items() if share > 0.99}
            for name, found in numbers.items()}
    assert told == {run.name: {"x", "rotation"}, "untrained": {"scale"},
                    f"cnn-same, {cnn.size:,} weights": {"y", "shear"}}
    assert all(share < 0.7 for name, found in numbers.items() for factor, share in found.items()
               if factor not in told[name])


@pytest.mark.parametrize("n", [7, 40, 100])
def test_images_looked_at_are_test_images_spread_over_all_of_them(n, runs):
    run = explore.load(runs["encapnet"])
    images, labels = run.images(n)
    assert len(images) == len(labels) == min(n, 40)
    place = [next(k for k, image in enumerate(run.data.test.images) if torch.equal(x, image / 255))
             for x in images]
    assert labels.tolist() == run.data.test.labels[place].tolist()
    steps = {b - a for a, b in zip(place[:-1], place[1:], strict=True)}
    assert (place[0], place[-1]) == (0, 39) and max(steps) - min(steps) <= 1 <= min(steps)


def test_untrained_is_the_network_before_training(runs):
    run = explore.load(runs["encapnet"])
    torch.manual_seed(run.config.seed)
    fresh = make_model(run.config, 10, 3)
    before = explore.untrained(run).net.get_parameter("classes.weight")
    assert torch.equal(before, fresh.get_parameter("classes.weight"))
    assert not torch.equal(before, run.net.get_parameter("classes.weight"))


def test_two_found_and_match_known_answers():
    scores = torch.tensor([[.9, .1, .8], [.9, .1, .8], [.1, .2, .9]])
    labels = torch.tensor([[2, 0], [0, 1], [0, 1]])
    assert explore.two_found(scores, labels) == pytest.approx((2 / 3, 1 / 3))
    a = torch.randn(5, 2, 8, 8)
    assert explore.match(a, 3 * a + 2) == pytest.approx(1)
    assert explore.match(a, -a) == pytest.approx(-1)
    assert abs(explore.match(a, a.roll(1, 0))) < 0.3


def test_the_capsule_looked_at_is_the_right_class_s(runs):
    for name in ("encapnet", "em"):
        run = explore.load(runs[name])
        x, labels = run.images(40)
        v = explore.features(run, x, labels).float()
        v = encapnet.squash(v) if name == "em" else v                  # a pose is not squashed
        torch.testing.assert_close(v.norm(dim=1), run.scores(x)[range(40), labels])


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


def linear(weight, seen):
    """A network whose scores are linear in the image, and which notes what it is shown."""
    def scores(x):
        seen.append(x.detach())
        return x.flatten(1) @ weight
    return SimpleNamespace(scores=scores)


@pytest.mark.parametrize("steps, restarts", [(1, 1), (10, 2)])
def test_attacks_on_a_linear_network_are_exact(steps, restarts):
    """The margin of linear scores can move by eps |w|_1 and no further."""
    x, eps, seen = 0.4 + 0.2 * torch.rand(200, 3, 2, 2), 0.02, []
    weight = torch.randn(12, 2)
    weight -= weight.mean(0)                                           # both classes occur
    run = linear(weight, seen)
    labels = run.scores(x).argmax(1)
    margin = -explore.rival(run.scores(x), labels)
    reach = eps * (weight[:, 0] - weight[:, 1]).abs().sum()
    found = explore.attack(run, x, labels, explore.rival, eps, steps, restarts, torch.Generator())
    clear = (margin - reach).abs() > 1e-4
    assert torch.equal(found[clear], (margin < reach)[clear]) and found.any() and not found.all()
    seen.clear()
    explore.attack(run, x[~found], labels[~found], explore.rival, eps, steps, restarts,
                   torch.Generator())
    assert all((look - x[~found]).abs().max() <= eps + 1e-6 for look in seen)


def test_unsquashed_undoes_squash_where_its_gradient_vanishes():
    s = (torch.tensor([1e-2, 1., 50.])[:, None] * torch.tensor([.6, .8])).requires_grad_()
    length = encapnet.squash(s).norm(dim=1)
    opened = explore.unsquashed(length)
    torch.testing.assert_close(opened, 2 * s.norm(dim=1).log(), atol=1e-3, rtol=1e-3)
    flat, = torch.autograd.grad(length.sum(), s, retain_graph=True)
    steep, = torch.autograd.grad(opened.sum(), s)
    assert flat[2].norm() < 1e-4 and steep[2].norm() == pytest.approx(2 / 50, rel=0.01)


def test_objectives_see_what_the_loss_hides(runs):
    run = explore.load(runs["encapnet"])
    scores, labels = torch.rand(7, 10), torch.arange(7)
    goals = explore.objectives(run)
    torch.testing.assert_close(goals["loss"](scores, labels).mean(),
                               encapnet.margin_loss(scores, labels))
    done = (0.05 + 0.9 * F.one_hot(labels, 10)).requires_grad_()       # right, so without loss
    gradient = {name: torch.autograd.grad(goal(done, labels).sum(), done)[0].abs().amax(1)
                for name, goal in goals.items()}
    assert gradient["loss"].eq(0).all() and gradient["margin"].gt(1).all()


def test_robustness_of_seeds_side_by_side(runs, capsys, monkeypatch):
    place, figures = runs["encapnet"].parent, []
    monkeypatch.setattr(explore, "save_figure", lambda figure, path: figures.append(figure))
    small = "--images 50 --steps 1 --restarts 1 --eps 4 64 --device cpu".split()
    paths = [str(runs[name]) for name in ("encapnet", "again", "cnn")]
    assert explore.main(["robustness", *paths, *small, "--output-dir", str(place / "out")]) == 0
    out = capsys.readouterr().out
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                     for line in out.splitlines() if line.startswith("| "))
    assert header[1].endswith("dims=(1, 1, 2, 2) feedback=2 (2)")
    assert header[2] == "cnn-same width=0.1 (1)"
    lines = [json.loads(line) for line in (place / "out/robustness.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 5] and lines[0]["images"] == 40
    seen = {row[0]: row[1:] for row in rows}
    for path, line in zip(paths, lines, strict=True):
        errors = line["errors"]
        tested = json.loads((explore.Path(path) / "result.json").read_text())["error"]
        assert errors["clean"]["0"] == pytest.approx(tested)           # the same 40 images
        assert set(explore.CHANGES) < set(errors)
        for eps in ("4", "64"):
            single = [errors[a][eps] for a in ("random signs", "FGSM", "PGD", "PGD margin")]
            assert errors["clean"]["0"] <= max(single) <= errors["any attack"][eps] <= 100
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    for test, strengths in lines[0]["errors"].items():
        values = {s: np.array([line["errors"][test][s] for line in lines]) for s in strengths}
        for s, (one, two, cnn) in values.items():
            assert seen[f"{test} {s}" if test != "clean" else test] == [
                f"{(one + two) / 2:.1f} +- {abs(one - two) / 2 ** 0.5:.1f}", f"{cnn:.1f}"]
        if test in panels:                                             # from no change at all on
            clean = np.array([line["errors"]["clean"]["0"] for line in lines])
            points = np.array([clean, *values.values()])
            for curve, mean, head in zip(panels[test].containers, (points[:, :2].mean(1),
                                         points[:, 2]), header[1:], strict=True):
                assert curve.get_label() == head.rpartition(" (")[0]
                np.testing.assert_allclose(curve.lines[0].get_ydata(orig=False), mean)
                np.testing.assert_allclose(curve.lines[0].get_xdata(orig=False),
                                           [0, *map(float, strengths)])
    assert len(panels) == 8


def test_runs_of_other_settings_are_not_seeds_of_one(runs, capsys):
    run = explore.load(runs["encapnet"])
    other = run._replace(config=dataclasses.replace(run.config, lam=5.0, loss="spread"))
    assert other.name == f"{run.name} loss=spread"
    assert explore.unlike(other, run.config) == {"lam": 5.0} and not explore.unlike(run, run.config)
    flags = explore.cnn_command(run).split()[2:]
    _, given = train.parse(flags)
    assert explore.training(make_config(**given)) == explore.training(run.config)


def test_a_network_that_is_always_wrong_cannot_be_attacked(runs):
    run = explore.load(runs["encapnet"])
    labels = run.data.test.labels
    with torch.no_grad():
        wrong = 1 + torch.cat([run.scores(run.images(len(labels))[0])]).argmax(1)
    run.data.test.labels = wrong % 10
    with pytest.raises(Problem, match="none of"):
        explore.measure(run, len(labels), 1, 1, (4,))


@pytest.mark.parametrize("arguments, words", [
    ("explain RUN --beside EM", "give a CNN"), ("robustness RUN RUN", "a second time"),
    ("robustness RUN --output-dir FILE", "FILE"), ("explain nowhere", "no checkpoint nowhere"),
    ("explain", "required: RUN"),
    ("robustness", "RUN"), ("imagine RUN", "invalid choice"),
    ("robustness RUN --steps 0", "at least 1"), ("explain RUN --beside nowhere", "nowhere")])
def test_bad_input_is_one_line(arguments, words, runs, capsys):
    places = {"RUN": runs["cnn"], "EM": runs["em"], "FILE": runs["cnn"] / "log.jsonl/FILE"}
    given = [str(places.get(word, word)) for word in arguments.split()]
    assert explore.main(given) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("explore: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("name, answer", [("FeedbackUnit", "loss"),
                                          ("sinkhorn_divergence", "divergence")])
def test_examples_of_the_readme_run(name, answer, tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
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
