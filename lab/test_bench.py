"""The benches compare equal functions, run, and (pytest -m speed) reach the ratios of the README.

Timings prove nothing on a busy machine: the ratios are asserted on request only.
"""
import itertools
import json
import time
from pathlib import Path

import pytest
import torch

import encapnet
from lab import bench
from lab.config import make_config

CPU = torch.device("cpu")
TINY = dict(types=2, positions=16, in_dim=8, out=16, out_dim=16, iterations=3)


def test_textbook_routing_is_the_same_function():
    layer = encapnet.RoutedCapsules(30, 8, 5, 16, softmax="out").double()
    u = torch.randn(2, 30, 1, 8, dtype=torch.float64)
    W = layer.weight.permute(0, 2, 3, 1)
    torch.testing.assert_close(bench.textbook_routing(u[:, :, 0], W), layer(u))


@pytest.mark.parametrize("name, skipped, error", [     # 10 iterations in another order
    ("ot.sinkhorn", 0, 0.1), ("POT batch, projection", 0, 0.1),
    ("geomloss", 1, 0.3)])                                 # it adds an entropy, anneals
def test_peers_compute_the_same_divergence_and_gradient(name, skipped, error):
    peers = bench.divergences()
    if name not in peers:
        pytest.skip("geomloss is not installed")
    x, y = torch.randn(2, 16, 6, dtype=torch.float64).add(torch.tensor([[[0.5]], [[0.0]]]))
    results = []
    for function in (encapnet.sinkhorn_divergence, peers[name]):
        x = x.detach().requires_grad_()
        value = function(x, y)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    for ours, theirs in list(zip(*results, strict=True))[skipped:]:
        assert (ours - theirs).norm() < error * ours.norm()


def test_peak_memory_is_that_of_this_call_beside_what_lives():
    held = torch.zeros(50_000_000)                                       # an older, higher peak
    def step():
        torch.zeros(10_000_000).add_(held[:10_000_000])                  # freed before the next
        return torch.zeros(5_000_000), torch.zeros(3_000_000)
    (_, last), found = bench.peak_memory(step, CPU)
    assert len(last) == 3_000_000 and found == pytest.approx(40e6, rel=1e-3)


@pytest.mark.parametrize("budget, calls", [(1e-6, 2), (0.3, 4)])
def test_a_time_is_that_of_a_call_the_first_aside(budget, calls):
    waits = []
    def step():
        waits.append(0.5 if not waits else 0.02)
        time.sleep(waits[-1])
    assert 0.02 <= bench.median_seconds(step, budget) < 0.2 and len(waits) >= calls


def test_a_comparison_is_seconds_and_megabytes_of_each_and_their_ratio(monkeypatch, tmp_path,
                                                                      capsys):
    """Of measurements made up: ours 4 ms and 2 MB, the other 12 ms and 50 MB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "median_seconds", lambda step: step()[0])
    monkeypatch.setattr(bench, "peak_memory", lambda step, device: ("result", step()[1]))
    bench.compare("something", {"ours": lambda: (0.004, 2e6), "theirs": lambda: (0.012, 50e6),
                                "too large": None}, CPU)
    first, last = speed_lines()
    names = ("what", "instead", "ours_seconds", "seconds", "ours_MB", "MB")
    assert [first[name] for name in names] == ["something", "theirs", 0.004, 0.012, 2, 50]
    assert [last[name] for name in names] == ["something", "too large", 0.004, None, 2, None]
    assert first["device"].startswith("CPU, ") and first["command"] and first["torch"]
    out = capsys.readouterr().out.splitlines()
    assert [word in out[0] for word in ("4.0 ms", "12.0 ms", "ratio 3.00")] == [True] * 3
    assert "4.0 ms" in out[1] and "ratio" not in out[1]


def test_a_bench_line_is_of_one_step_and_in_the_units_it_names(monkeypatch, tmp_path, capsys):
    """A step of 0.25 s for 6 images, forward and backward 0.2 s; 3 MB."""
    monkeypatch.chdir(tmp_path)
    updates, asked, seconds = [], [], iter([0.25, 0.2])

    def update(run, images, *_):
        assert run.net.training
        updates.append(images.shape)

    def median_seconds(step, budget):
        before = len(updates)
        step()
        asked.append((len(updates) > before, budget))
        return next(seconds)
    monkeypatch.setattr(bench, "train_step", update)
    monkeypatch.setattr(bench, "median_seconds", median_seconds)
    monkeypatch.setattr(bench, "peak_memory", lambda function, device: (function(), 3e6))
    bench.bench_step(make_config(dataset="mnist", model="cnn-same", set={"width": 0.1},
                                 batch_size=6, device="cpu"), 5.0)
    assert asked == [(True, 5.0), (False, 5.0)]           # of an update, and without
    assert updates == 3 * [(6, 3, 32, 32)]                # two before: Adam has its moments then
    line, = (line["bench"] for line in results())
    assert line.pop("device").startswith("CPU, ")
    net = encapnet.build("cnn-same", width=0.1)
    assert line == {"model": "cnn-same", "set": {"width": 0.1}, "image_size": 32, "amp": False,
                    "compile": False, "channels_last": False, "batch_size": 6, "memory_MB": 3,
                    "parameters": sum(p.numel() for p in net.parameters()),
                    "step_seconds": 0.25, "forward_backward_seconds": 0.2}
    out = capsys.readouterr().out
    assert [word in out for word in ("24.0 images/s", "step 250.0 ms", "backward 200.0 ms",
                                     " 3 MB")] == [True] * 4


def test_forward_and_backward_are_of_both_losses(monkeypatch, tmp_path):
    """A loss of 2 w and a divergence of 3 w, at lambda 5: the gradient is 17, each time anew."""
    monkeypatch.chdir(tmp_path)
    gradients, runs = [], []

    def weight(run):
        return next(iter(run.net.parameters()))

    def losses(run, *batch):
        gradients.append(weight(run).grad)
        w = weight(run).flatten()[0]
        return 2 * w, 3 * w, None

    def median_seconds(step, budget):
        step()
        step()
        return 1.0
    monkeypatch.setattr(bench, "train_step", lambda run, *batch: runs.append(run))
    monkeypatch.setattr(bench, "losses", losses)
    monkeypatch.setattr(bench, "median_seconds", median_seconds)
    bench.bench_step(make_config(dataset="mnist", model="cnn-same", set={"width": 0.1}, lam=5.0,
                                 batch_size=2, device="cpu"))
    assert gradients == [None, None] and weight(runs[0]).grad.flatten()[0] == 17


@pytest.fixture
def counted(monkeypatch):
    """counted(place, name): the list that each later call of place.name adds to."""
    def count(place, name):
        calls, function = [], getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **kw: calls.append(args) or
                            function(*args, **kw))
        return calls
    return count


@pytest.mark.parametrize("form, built, textbook", [("factored", 0, 0), ("votes", 1, 0),
                                                   ("textbook code", 0, 1)])
def test_forms_of_routing_are_what_they_are_called(form, built, textbook, counted):
    votes = counted(encapnet.RoutedCapsules, "votes")
    loops = counted(bench, "textbook_routing")
    bench.routing_step("dynamic", form, 2, TINY, CPU)()
    assert (len(votes), len(loops)) == (built, textbook)


def test_every_peer_of_the_divergence_is_called(at_once, monkeypatch):
    """Once to be timed, once to be weighed, on two batches of the shape that the line names."""
    shapes = {}
    def noting(name):
        return lambda x, y: shapes.setdefault(name, []).extend((x.shape, y.shape)) or (x * y).sum()
    names = ["ours", "a peer", "another"]
    monkeypatch.setattr(bench, "divergences", lambda: {name: noting(name) for name in names})
    bench.bench_sinkhorn(CPU, 8, 4)
    assert shapes == {name: 4 * [(8, 4)] for name in names}
    assert [(line["what"], line["instead"]) for line in speed_lines()] == [
        ("divergence of two 8x4 batches", name) for name in names[1:]]


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """One call per measurement, into an empty folder; the k-th takes 100 k seconds."""
    monkeypatch.chdir(tmp_path)
    seconds = itertools.count(100, 100)
    monkeypatch.setattr(bench, "median_seconds", lambda step: (step(), next(seconds))[1])


def results():
    return [json.loads(line) for line in Path("runs/results.jsonl").read_text().splitlines()]


def speed_lines():
    return [line["speed"] for line in results()]


def test_routing_in_miniature(at_once):
    """Every batch of every form beside its peer's; of 128 images there are no votes."""
    bench.bench_routing(CPU, [("layer", "em", {**TINY, "positions": 1}, "votes", (1, 127, 128))])
    lines = speed_lines()
    assert [line["what"] for line in lines] == [f"layer, batch {n}" for n in (1, 127, 128)]
    assert [line["ours_seconds"] for line in lines] == [100, 300, 500]
    assert [line["seconds"] for line in lines] == [200, 400, None]
    assert lines[1]["MB"] > 127 * 2 * 16 * 16 * 4 / 1e6 and lines[2]["MB"] is None


def test_the_layer_of_the_bench_of_routing_is_table_1s():
    with torch.device("meta"):
        layer = encapnet.build("capnet-dynamic").routed[0]
    types, positions, *others, iterations = bench.TABLE_1.values()
    assert layer.weight.shape == (types, *others) and layer.iterations == iterations
    assert types * positions == others[1] == 2048


def test_bench_from_the_command_line(monkeypatch):
    called = []
    monkeypatch.setitem(bench.BENCHES, "sinkhorn", called.append)
    assert bench.main(["sinkhorn", "--device", "cpu"]) == 0 and called == [CPU]


def test_help_and_errors_of_bench_speak_to_its_user(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out
    assert "usage: python -m lab.bench " in told
    assert all(f"python -m lab.bench {name}  " in told for name in bench.BENCHES)
    for words in ([], ["speed"], ["routing", "--device", "gpu"], ["routing", "--seeds", "2"]):
        assert bench.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1, words


# The targets, least ratio of time and of memory: pytest -m speed, on a quiet machine

ROUTING = [("dynamic", 1, 4, 5), ("dynamic", 4, 10, 25), ("em", 1, 2, 12), ("em", 4, 5, 50)]


def routing_costs(routing, forms, batch, shape):
    steps = [bench.routing_step(routing, form, batch, shape, CPU) for form in forms]
    return [(bench.median_seconds(step), bench.peak_memory(step, CPU)[1] / 1e6) for step in steps]


def test_costs_of_a_network_are_those_of_its_settings_on_any_device():
    config = make_config(dataset="cifar10", set={"depths": (1, 1, 1, 1)}, batch_size=64)
    line = {"model": "encapnet", "set": {"depths": [1, 1, 1, 1]}, "image_size": 32, "amp": False,
            "compile": False, "channels_last": False, "batch_size": 64, "device": "a card",
            "forward_backward_seconds": 1.0}
    older = {name: value for name, value in line.items() if name != "forward_backward_seconds"}
    others = [{**line, **change} for change in (
        {"set": {}}, {"model": "resnet18"}, {"image_size": 16}, {"amp": True}, {"compile": True},
        {"channels_last": True}, {"batch_size": 8})]
    same = [line, {**line, "device": "another"}]
    assert bench.costs_of(config, [*same, *others, older, {"model": "encapnet"}]) == same


@pytest.mark.speed
@pytest.mark.parametrize("routing, batch, faster, leaner", ROUTING)
def test_speed_of_routing_without_votes(routing, batch, faster, leaner):
    ours, votes = routing_costs(routing, ("factored", "votes"), batch, bench.TABLE_1)
    assert votes[0] > faster * ours[0] and votes[1] > leaner * ours[1]


@pytest.mark.speed
@pytest.mark.parametrize("routing, limit", [("dynamic", 500), ("em", 500)])
def test_memory_at_batch_128(routing, limit):
    assert routing_costs(routing, ["factored"], 128, bench.TABLE_1)[0][1] < limit


@pytest.mark.speed
@pytest.mark.parametrize("batch, faster", [(1, 0.95), (16, 1.5), (64, 1.5)])
def test_speed_of_digitcaps(batch, faster):
    ours, plain = routing_costs("dynamic", ("factored", "textbook code"), batch, bench.DIGITCAPS)
    assert plain[0] > faster * ours[0]


@pytest.mark.speed
@pytest.mark.parametrize("name, faster", [("ot.sinkhorn", 2.5), ("geomloss", 3),
                                          ("POT batch, projection", 1.3)])
def test_speed_of_the_divergence(name, faster):
    if name not in bench.divergences():
        pytest.skip("geomloss is not installed")
    ours, theirs = (bench.median_seconds(bench.divergence_step(function, 128, 16, CPU))
                    for function in (bench.OURS, bench.divergences()[name]))
    assert theirs > faster * ours
