"""why: what is measured is what its name says; both figures are drawn."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import encapnet
from encapnet import EncapNet, margin_loss
from lab import figures, why
from lab.config import make_config
from lab.data import load_data, shuffle
from lab.fit import build_run
from lab.paper import TABLES, part_cells, row_config
from lab.results import config_key
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


@pytest.fixture
def mnist(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 28, 28))
    write_idx(tmp_path, "MNIST", dict.fromkeys(("train", "test"), (noise, np.arange(4))))
    return str(tmp_path)


def test_em_is_measured_in_both_forms(mnist):
    """The first iteration is alike; left as they are, log densities leave fewer votes after it."""
    found = why.em_statistics(mnist, rounds=2, images=2)
    layers = {(layer, form): found[f"layer {layer}, {form}"]
              for layer in (1, 2) for form in ("standardised", "not standardised")}
    assert len(found) == 4
    first, other = (layers[1, form]["effective votes"] for form in why.FORMS)
    assert first[0] == other[0] and first[1] > other[1]
    assert all(len(values) == 2 for seen in found.values() for values in seen.values())


def test_em_is_trained_in_both_forms(monkeypatch):
    """The study's network of three iterations, by explicit votes, so that both forms are exact."""
    trained = []

    def errors_after_training(config):
        trained.append((encapnet.standardise, config))
        return 10.0 * len(trained), 99.0
    monkeypatch.setattr(why, "new_run", lambda config: config)
    monkeypatch.setattr(why, "errors_after_training", errors_after_training)
    assert why.em_errors("there", 2) == {"standardised": [10, 20], "not standardised": [30, 40]}
    assert [form(torch.tensor([3.0, 5.0])).tolist() for form, _ in trained] == [
        *2 * [[-1, 1]], *2 * [[3, 5]]]
    study = config_key(part_cells(TABLES["routing"][0], {})["3", "EM"])
    for (_, config), seed in zip(trained, (0, 1, 0, 1), strict=True):
        assert (config.seed, config.data_path) == (seed, "there")
        assert config.set.pop("factored") is False and config_key(config) == study


def looks(line):
    return line.get_linestyle(), line.get_color()


def test_em_is_drawn_iteration_by_iteration(mnist, monkeypatch):
    """Made-up statistics, other ones for each layer (256 and 10 higher capsules) and form."""
    def statistics(layer, u, activation, rounds):
        n_out = layer.weight.shape[2]
        both = encapnet.standardise is why.FORMS["standardised"]
        return {"effective votes": [n_out, n_out + 1 + both],
                "deviation of log p": [3 + both, 1 / n_out]}
    monkeypatch.setattr(why, "layer_statistics", statistics)
    monkeypatch.setattr(why, "em_errors", lambda data_path, seeds: {
        "standardised": [5.0, 6.0], "not standardised": [50.0, 80.0]})
    figure, found = why.em(mnist, rounds=2, images=2)
    expected = {f"layer {layer}, {form}": {
        "effective votes": [n_out, n_out + 1 + both], "deviation of log p": [3 + both, 1 / n_out]}
        for layer, n_out in ((1, 256), (2, 10))
        for form, both in (("standardised", True), ("not standardised", False))}
    assert found == {"statistics": expected, "errors": {"standardised": [5, 6],
                                                        "not standardised": [50, 80]}}
    *axes, last = figure.axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in last.lines] == [
        ([0, 0], [5, 6]), ([1, 1], [50, 80])]
    assert [text.get_text() for text in last.get_xticklabels()] == ["standardised",
                                                                    "not standardised"]
    for axis, what in zip(axes, ("effective votes", "deviation of log p"), strict=True):
        assert axis.get_ylabel().startswith(what) and axis.get_yscale() == "log"
        drawn = {line.get_label(): line[0] for line in axis.containers}
        assert {label: line.get_ydata().tolist() for label, line in drawn.items()} == {
            label: values[what] for label, values in expected.items()}
        assert all(line.get_xdata().tolist() == [1, 2] for line in drawn.values())
        assert len(set(map(looks, drawn.values()))) == 4
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == \
        list(found["statistics"])


def test_the_burst_is_drawn_step_by_step(monkeypatch):
    """Made-up gradients and rates of two steps: images in the first epoch's order, at lambda 10."""
    asked, shown = [], []
    tiny = dict(test_images=2, batch_size=8, set=dict(types=2, dims=(1, 1, 2, 2)))
    monkeypatch.setattr(why, "make_config", lambda **given: asked.append(given) or make_config(
        **given, **tiny))

    def observed_step(run, images, labels, draws):
        shown.append((images, labels, draws, run.step))
        return [10 ** run.step, 3 + run.step, run.config.clip + 0.5]
    monkeypatch.setattr(why, "observed_step", observed_step)
    figure, found = why.burst(16)
    assert [(given["lam"], given["clip"], given["train_images"]) for given in asked] == [
        (10, 0, 16), (10, 1, 16)]
    config = make_config(train_images=16, **tiny)
    data, (order, draws) = load_data(config, CPU), shuffle(16, config.seed, 0)
    for k, (images, labels, used, step) in enumerate(shown):
        chunk = order[k % 2 * 8:][:8]
        assert torch.equal(images, data.train.images[chunk]) and step == k % 2
        assert torch.equal(labels, data.train.labels[chunk]) and torch.equal(used, draws[chunk])
    curves = {"margin loss": [1, 10], "lambda x divergence": [3, 4]}
    assert found == {"not clipped": {**curves, "rate": [0.5, 0.5]},
                     "clipped to 1": {**curves, "rate": [1.5, 1.5]}}
    drawn = [{line.get_label(): line for line in axis.lines} for axis in figure.axes]
    for lines, names in zip(drawn, (list(curves), ["rate"]), strict=True):
        assert {label: line.get_ydata().tolist() for label, line in lines.items()} == {
            f"{name}, {form}": seen[name] for form, seen in found.items() for name in names}
        assert all(list(line.get_xdata()) == [0, 1] for line in lines.values())
        assert len(set(map(looks, lines.values()))) == len(lines)
    assert [axis.get_xlabel() for axis in figure.axes] == ["step", "step"]
    assert "gradient" in figure.axes[0].get_ylabel()
    assert "learning rate" in figure.axes[1].get_ylabel()


def test_figures_and_numbers_are_written_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {"not clipped": {"rate": [1.0]}}
    monkeypatch.setattr(why, "burst", lambda: (figures.canvas(1, 2)[0], found))
    assert why.main(["burst"]) == 0
    assert json.loads(Path("runs/why-burst.json").read_text())["found"] == found
    assert Path("runs/why-burst.png").read_bytes()[:4] == b"\x89PNG"


def test_lengths_at_the_start_are_means_of_norms():
    net = EncapNet(3, 1, 8, depths=(1, 1), dims=(1, 2, 3), types=2)
    seen = {2: [], 3: []}
    for layer, d in zip(why.capconvs(net), (2, 2, 3, 3), strict=True):
        layer.register_forward_hook(lambda m, u, v, d=d: seen[d].append(np.mean(
            [np.linalg.norm(v[b, g * d:g * d + d, y, x].detach()) for b in range(2)
             for g in range(2) for y in range(v.shape[2]) for x in range(v.shape[3])])))
    found = why.starting_lengths(net, torch.randn(2, 1, 8, 8))
    assert found == pytest.approx({d: np.mean(lengths) for d, lengths in seen.items()}, rel=1e-4)


def network_of(parts):
    torch.manual_seed(0)
    net = encapnet.build("encapnet", image_size=8, types=2, depths=(2, 2), dims=(1, 2, 3))
    why.use_parts(net, parts)
    return net.eval()


def test_parts_come_one_at_a_time():
    """What each network has of EncapNet, read off its layers, its weights and its answers."""
    nets, x = [network_of(parts) for parts in range(7)], 5 * torch.randn(2, 3, 8, 8)
    layers = [why.capconvs(net) for net in nets]
    assert [{layer.master.groups for layer in found} for found in layers] == [{1}] + 6 * [{2}]
    assert [{layer.master.kernel_size for layer in found} for found in layers[:2]] == [
        {(3, 3)}, {(3, 3), (1, 1)}]
    assert [{layer.coefficients for layer in found} for found in layers] == [
        {None}] + 3 * [{"fixed"}] + 3 * [{"both"}]
    assert [hasattr(found[0], "from_v1") for found in layers] == 4 * [False] + 3 * [True]
    lengths = []
    for found in layers:
        found[-1].norm.weight.data *= 100
        found[-1].register_forward_hook(lambda layer, u, v: lengths.append(
            v.unflatten(1, (2, 3)).norm(dim=2).max()))
    answers = [net(x)[0] for net in nets]
    assert [length > 1 for length in lengths] == 2 * [True] + 5 * [False]    # then squashed
    weights = [[layer.norm.weight[0].item() for layer in found[:-1]] for found in layers]
    root = pytest.approx([2 ** -0.5] * 3 + [3 ** -0.5] * 2)
    assert weights[:3] == 3 * [5 * [1]] and all(found == root for found in weights[3:])
    assert [type(net.classes) for net in nets] == 5 * [torch.nn.Linear] + 2 * [encapnet.CapFC]
    u = nets[4].walk(nets[4].stem(x))[0]
    assert torch.allclose(answers[4], nets[4].classes(u.mean((2, 3))))
    assert torch.allclose(answers[5], 10 * answers[6])         # the same weights
    assert [net.logits for net in nets] == 6 * [True] + [False]


def test_errors_are_of_the_network_asked_for(tmp_path, monkeypatch):
    """The setting, the seed, the loss, and that the weights which the parts bring are trained."""
    asked, trained = [], []
    noise = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    write_idx(tmp_path, "MNIST", dict.fromkeys(("train", "test"), (noise, np.arange(40) % 10)))
    monkeypatch.setattr(why, "row_config", lambda *layers: asked.append(row_config(*layers)) or
                        dataclasses.replace(asked[-1], dataset="mnist", data_path=str(tmp_path),
                                            train_images=40, batch_size=8, epochs=2, workers=0))

    def train_step(run, images, labels, draws):
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        trained.append((run.epoch, held == {id(p) for p in run.net.parameters()}))
        return torch.tensor([7, 8, run.epoch / 4, 9, 9])       # the third is the share of errors
    monkeypatch.setattr(why, "train_step", train_step)
    monkeypatch.setattr(why, "evaluate", lambda run: {"error": 40 + run.epoch, "top5_error": 5})
    for network in why.NETWORKS[0], why.NETWORKS[1], why.NETWORKS[6], why.NETWORKS[7]:
        trained.clear()
        held_out, training = why.errors_of(network, 3, "somewhere")
        assert (held_out, training) == (42, 25)                # after both epochs, of the last
        assert trained == 4 * [(0, True)] + 4 * [(1, True)]
    for config, model, loss in zip(asked, ("resnet18", *3 * ["encapnet"]),
                                   (*3 * ["ce"], "margin"), strict=True):
        assert (config.model, config.loss, config.seed, config.hold_out) == (model, loss, 3, True)
        assert (config.data_path, config.image_size, config.train_images, config.epochs) == (
            "somewhere/cifar10-jpeg", 16, 20000, 5)
        assert (config.augment, config.flip, config.clip, config.lr) == ("+", True, 1, 3e-3)
        assert config.set == ({"width": 0.125, "feedback": 0} if model == "resnet18"
                              else {"types": 4, "feedback": 0})


def test_steps_run_what_is_missing_and_are_drawn(tmp_path, monkeypatch):
    """Made-up errors; the first of two seeds was stopped after two networks."""
    monkeypatch.chdir(tmp_path)
    calls, stop = [], 3

    def errors_of(network, seed, data_path):
        calls.append((network, seed, data_path))
        k = why.NETWORKS.index(network)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return 10.0 * k + seed, k + seed / 2
    monkeypatch.setattr(why, "errors_of", errors_of)
    with pytest.raises(KeyboardInterrupt):
        why.steps("data", seeds=2)
    stop = calls.clear()
    figure, found = why.steps("data", seeds=2)
    assert calls[:2] == [(why.NETWORKS[2], 0, "data"), (why.NETWORKS[3], 0, "data")]
    assert len(calls) == 14 and calls[-1] == (why.NETWORKS[7], 1, "data")
    assert list(found["errors"]) == why.NETWORKS
    left, right = figure.axes
    assert {line.get_label(): line.get_ydata()[-1] for line in left.lines} == {
        "1 / sqrt(d)": pytest.approx(0.3, abs=0.03), "1": pytest.approx(0.86, abs=0.03)}
    for bars, (first, step, below) in zip(right.containers, ((0.5, 10, -0.125), (0.25, 1, 0.125)),
                                          strict=True):
        assert bars[0].get_xdata().tolist() == [first + step * k for k in range(8)]
        assert bars[0].get_ydata().tolist() == [k + below for k in range(8)]
    (low, *_), (high, *_) = right.containers[0][2][0].get_segments()[0]
    assert high - low == pytest.approx(2 * 12.706 * 0.5, rel=1e-3)      # Student's t
    assert [bars.get_label() for bars in right.containers] == ["held-out images", "training images"]
    assert [text.get_text() for text in right.get_yticklabels()] == why.NETWORKS
