"""why: what is measured is what its name says; both figures are drawn."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from encapnet import margin_loss
from lab import why
from lab.config import make_config
from lab.data import load_data
from lab.fit import build_run
from lab.test_data import write_idx

CPU = torch.device("cpu")


def test_effective_votes_and_deviation_known_answers():
    """Two votes of equal weight are two; a log density written out for one number."""
    votes = torch.tensor([0.0, 2.0, 50.0]).view(1, 3, 1, 1).repeat(1, 1, 2, 1)
    votes[0, :, 1, 0] = torch.tensor([0.0, 1.0, 4.0])
    R = torch.tensor([[[0.5, 0.5], [0.5, 0.0], [0.0, 0.5]]])
    mu = torch.tensor([[[1.0], [2.0]]])                   # means of votes 0, 1 and of votes 0, 2
    effective, deviation = why.routing_statistics(votes, torch.ones(1, 3), mu, R)
    assert effective.tolist() == [[2, 2]]
    first = [torch.distributions.Normal(m, s).log_prob(torch.tensor(0.0)).item()
             for m, s in ((1.0, 1.0), (2.0, 2.0))]
    assert deviation[0, 0].item() == pytest.approx(abs(first[0] - first[1]) / 2, rel=1e-5)
    off, _ = why.routing_statistics(votes, torch.tensor([[1.0, 0.0, 1.0]]), mu, R)
    assert off.tolist() == [[1, 2]]                       # an input that is off is no vote


def test_a_step_s_parts_are_those_of_the_losses():
    config = make_config(train_images=8, test_images=2, batch_size=8, lam=7.0, weight_decay=0.0,
                         set=dict(types=2, dims=(1, 1, 2, 2)), device="cpu", channels_last=False)
    run, twin = (build_run(config, load_data(config, CPU), CPU) for _ in range(2))
    images, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    x = (images / 255 - run.data.mean.view(3, 1, 1)) / run.data.std.view(3, 1, 1)
    weights = list(twin.net.train().blocks.parameters())
    norms = []
    for part in ("margin", "divergence"):
        scores, feedback = twin.net(x)
        total = 7 * feedback if part == "divergence" else margin_loss(scores, labels)
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm().item())
    *found, rate = why.observed_step(run, images, labels, torch.rand(8, 7))
    assert found == pytest.approx(norms, rel=1e-3)
    assert 0.9 < rate <= 1.001                            # Adam's first step moves by the rate


def test_em_is_drawn(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 28, 28))
    write_idx(tmp_path, "MNIST", dict.fromkeys(("train", "test"), (noise, np.arange(4))))
    figure, found = why.em(str(tmp_path), rounds=2, images=2)
    drawn = [line[0].get_ydata().tolist() for axis in figure.axes for line in axis.containers]
    assert drawn == [list(seen[what]) for what in ("effective votes", "deviation of log p")
                     for seen in found.values()] and len(drawn) == 8
    layers = {(layer, form): found[f"layer {layer}, log p {form}"]
              for layer in (1, 2) for form in ("standardised", "as it is")}
    first, other = (layers[1, form]["effective votes"] for form in ("standardised", "as it is"))
    assert first[0] == other[0] and first[1] > other[1]                # fewer as it is
    assert all(len(values) == 2 for seen in found.values() for values in seen.values())


def test_the_burst_is_drawn_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(why.burst, "__defaults__", (128,))             # images: two steps
    assert why.main(["burst"]) == 0
    found = json.loads(Path("runs/why-burst.json").read_text())["found"]
    assert [len(values) for seen in found.values() for values in seen.values()] == 6 * [2]
    assert found["not clipped"]["rate"] != found["clipped to 1"]["rate"]
    assert Path("runs/why-burst.png").stat().st_size > 10_000
