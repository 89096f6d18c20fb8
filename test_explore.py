"""explore.py: its pictures, its attacks, and the README's examples."""
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
import torch.nn.functional as F

import encapnet
import explore
import train

HERE = Path(__file__).parent
MODELS = {"encapnet": "encapnet-small --set types=2 --set dims=(1,1,2,2)",
          "em": "capnet-em --set types=2", "cnn": "cnn-same --set width=0.1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny finished runs, name -> folder."""
    place, folders = tmp_path_factory.mktemp("explore"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, model in MODELS.items():
            flags = ("--train-images 32 --test-images 40 --batch-size 16 --epochs 1 --device cpu "
                     f"--output-dir {name} --model {model}")
            assert train.main(flags.split()) == 0
            folders[name] = place / name
    return folders


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(explore, "DRAWN", 200)


@pytest.mark.parametrize("name, parts", [("encapnet", "1235"), ("em", "134"), ("cnn", "1")])
def test_explain_draws_the_parts_that_apply_and_says_what_it_left_out(name, parts, runs, fewer):
    beside = [] if name == "cnn" else ["--beside", str(runs["cnn"])]
    assert explore.main(["explain", str(runs[name]), *beside]) == 0
    assert (runs[name] / "explain.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((runs[name] / "explain.json").read_text())
    assert "".join(key[0] for key in numbers if key[0].isdigit()) == parts
    left_out = re.findall(r"Left out: (\d)", "\n".join(numbers["notes"]))
    assert sorted([*parts, *left_out]) == list("12345")
    poses = numbers[explore.PARTS[0][0]]
    assert len(poses) == (2 if name == "cnn" else 3)                   # the CNN stands beside
    assert all(0 <= r <= 1 for fit in poses.values() for r in fit.values())


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
    moved, inner = change("shift", 2), (slice(None), slice(3, -3), slice(3, -3))
    for image, before in zip(moved, x, strict=True):
        near = [image[inner].allclose(before.roll((a, b), (1, 2))[inner], atol=1e-5)
                for a in (-2, 2) for b in (-2, 2)]
        assert sum(near) == 1
    ramp = torch.arange(12.).expand(6, 1, 12, 12) - 5.5                # twice or half as steep
    slope = explore.changed(ramp, "scale", 1, torch.Generator().manual_seed(0))[:, 0, 6, 5:7].diff()
    assert set(slope.flatten().tolist()) <= {0.5, 2.0}
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


def test_robustness_of_seeds_side_by_side(runs, capsys):
    place = runs["encapnet"].parent
    small = "--images 20 --steps 2 --restarts 1 --eps 4 64 --device cpu".split()
    paths = [str(runs[name]) for name in ("encapnet", "encapnet", "cnn")]
    assert explore.main(["robustness", *paths, *small, "--output-dir", str(place / "out")]) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("| error"))
    assert "dims=(1, 1, 2, 2) (2)" in header and "cnn-same width=0.1 (1)" in header
    assert "+-" in out and "2 steps of 2.5 eps / 2, 1 restarts" in out
    lines = [json.loads(line) for line in (place / "out/robustness.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        errors = line["errors"]
        assert set(explore.CHANGES) < set(errors)
        for eps in ("4", "64"):
            single = [errors[a][eps] for a in ("random signs", "FGSM", "PGD", "PGD margin")]
            assert errors["clean"]["0"] <= max(single) <= errors["any attack"][eps] <= 100
    assert (place / "out/robustness.png").exists()


@pytest.mark.parametrize("arguments, words", [
    ("explain nowhere", "no checkpoint nowhere"), ("explain", "required: RUN"),
    ("robustness", "RUN"), ("imagine RUN", "invalid choice"),
    ("robustness RUN --steps 0", "at least 1"), ("explain RUN --beside nowhere", "nowhere")])
def test_bad_input_is_one_line(arguments, words, runs, capsys):
    given = [str(runs["cnn"]) if word == "RUN" else word for word in arguments.split()]
    assert explore.main(given) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("explore.py: ") and err.count("\n") == 1


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
    (tmp_path / "figures").mkdir()
    matplotlib.use("Agg")
    scope = {}
    exec(examples[0], scope)
    assert math.isfinite(scope[answer].detach())
    if name == "sinkhorn_divergence":
        assert scope[answer] < 0.05 and (tmp_path / "figures/cloud.png").exists()
