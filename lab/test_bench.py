"""The benches compare equal functions, run, and (pytest -m speed) reach the ratios of the README.

Timings prove nothing on a busy machine: the ratios are asserted on request only.
"""
import json
import time
from pathlib import Path

import pytest
import torch

import encapnet
from lab import bench, figures
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


def test_a_time_is_that_of_a_call_the_first_aside():
    waits = []
    def step():
        waits.append(0.5 if not waits else 0.02)
        time.sleep(waits[-1])
    assert 0.02 <= bench.timed(step, budget=1e-6)[0] < 0.05 and len(waits) == 2
    assert 0.02 <= bench.timed(step, budget=0.1)[0] < 0.05 and len(waits) > 5


def test_steps_are_timed_in_turn():
    calls = []
    bench.timed(lambda: calls.append("a"), lambda: calls.append("b"), budget=1e-6)
    assert calls == ["a", "b"] * (len(calls) // 2) and len(calls) >= 4


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


SMALL = dict(types=2, depths=(1, 1), dims=(1, 2, 2))


def test_forms_of_the_network_are_what_they_are_called(counted, monkeypatch):
    compiled, found = [], {}
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    seen = counted(encapnet.FeedbackUnit, "generate")
    for form, step in bench.network_steps(CPU, batch=2, **SMALL).items():
        seen.clear()
        step()
        net = step.args[0].model
        grouped = any(isinstance(layer, encapnet.GroupedConv) for layer in net.modules())
        found[form] = len(seen), any(net is other for other in compiled), grouped
        assert net.types == 2 and len(net.blocks) == 2 and len(step.args[1]) == 2
    assert found == {"without feedback": (0, False, True), "--compile": (0, True, True),
                     "a type a group": (0, False, False), "1 unit a module": (2, False, True),
                     "2 units a module": (4, False, True)}


def test_every_peer_of_the_divergence_is_called(at_once, monkeypatch):
    shapes = {}
    def noting(name):
        return lambda x, y: shapes.setdefault(name, []).append(x.shape) or (x * y).sum((-1, -2))
    monkeypatch.setattr(bench, "OURS", noting("ours"))
    monkeypatch.setattr(bench, "divergences", lambda: {"ours": bench.OURS, "peer": noting("peer")})
    bench.bench_sinkhorn(CPU, 8, 4, 3)
    assert set(shapes["peer"]) == {(8, 4)} and set(shapes["ours"]) == {(8, 4), (3, 8, 4)}
    one, units = (shapes["ours"].count(shape) for shape in ((8, 4), (3, 8, 4)))
    assert one == len(shapes["peer"]) + 3 * units         # a loop over the units, beside ours


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """One call a measurement, into an empty folder; the k-th step takes 100 k seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(bench, "timed", lambda *steps, **_: [
        (step(), 100.0 * k)[1] for k, step in enumerate(steps, 1)])


def results():
    return [json.loads(line) for line in Path("runs/results.jsonl").read_text().splitlines()]


def speed_lines():
    return [line["speed"] for line in results()]


def test_routing_in_miniature(at_once, capsys):
    """Every batch of every form beside its peer's, where there is one."""
    bench.bench_routing(CPU, [("layer", "em", TINY, "votes", {1: True, 4: False})])
    first, last = speed_lines()
    assert [line["what"] for line in (first, last)] == ["layer, batch 1", "layer, batch 4"]
    assert [first[name] for name in ("instead", "ours_seconds", "seconds")] == ["votes", 100, 200]
    assert "100,000.0 ms; votes: 200,000.0 ms, ratio 2.00" in capsys.readouterr().out
    assert first["MB"] > 4 * 32 * 16 * 16 / 1e6 and first["MB"] != first["ours_MB"]
    assert last["ours_seconds"] and last["seconds"] is last["MB"] is None


def test_the_layer_of_the_bench_of_routing_is_table_1s():
    with torch.device("meta"):
        layer = encapnet.build("capnet-dynamic").routed[0]
    types, positions, *others, iterations = bench.TABLE_1.values()
    assert layer.weight.shape == (types, *others) and layer.iterations == iterations
    assert types * positions == others[1] == 2048


def test_sinkhorn_in_miniature(at_once):
    bench.bench_sinkhorn(CPU, 8, 4, 2)
    assert speed_lines()[0]["instead"] == "ot.sinkhorn"


def test_network_in_miniature(at_once, monkeypatch):
    network_steps = bench.network_steps
    monkeypatch.setattr(bench, "network_steps", lambda device, types, batch: network_steps(
        device, batch=2, **{**SMALL, "types": types // 4}))
    bench.bench_network(CPU)
    assert [(line["what"].split(",")[1], line["instead"]) for line in speed_lines()] == [
        (f" {types} types", instead) for types in (8, 32) for instead in (
            "--compile", "a type a group", "1 unit a module", "2 units a module")]


def test_growth_is_of_the_curve_and_axis_that_it_says(monkeypatch, tmp_path):
    """Seconds that are the number of samples and bytes that are its square."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "divergence_step", lambda function, n, dim, device: n)
    monkeypatch.setattr(bench, "costs", lambda steps, device: [(n, n ** 2) for n in steps])
    drawn, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda *args: drawn.append(args[0]) or save(*args))
    sweeps = [sweep for sweep in bench.SWEEPS if sweep[1] == "samples"]
    bench.bench_scaling(CPU, sweeps)
    lines = [line["scaling"] for line in results()]
    assert [(line["of"], line["what"], line["against"]) for line in lines] == [
        ("Sinkhorn", unit, "samples of a divergence") for unit in ("seconds", "MB")]
    assert [line["exponent"] for line in lines] == pytest.approx([1, 2])
    assert lines[1]["measured"] == [n ** 2 for n in lines[1]["values"]]
    assert Path("runs/scaling.png").stat().st_size > 10_000
    for axis, line in zip(drawn[0].axes, lines, strict=True):          # seconds above MB
        ticks = [tick.get_text() for tick in axis.get_xticklabels()]
        assert ticks == [str(n) for n in line["values"]] and axis.get_ylabel() == line["what"]
        assert axis.containers[0][0].get_ydata().tolist() == line["measured"]


def test_every_case_of_growth_is_what_its_axis_says(monkeypatch):
    """Built, not run: the layer's batch, capsules and iterations, the network's batch and side."""
    layers, images = [], []
    monkeypatch.setattr(bench, "training_step", lambda config, device: (images.append(
        (config.model, config.batch_size, config.image_size)), None))
    monkeypatch.setattr(bench, "routing_step", lambda routing, form, batch, shape, device: (
        layers.append((routing, form, batch, shape["types"] * shape["positions"], shape["out"],
                       shape["iterations"]))))
    for _, keyword, values, curves in bench.SWEEPS:
        for name in curves:
            bench.CURVES[name](CPU, **{keyword: values[-1]})
    assert layers == [(routing, "factored", *sizes) for sizes in (
        (32, 512, 512, 3), (4, 1024, 1024, 3), (4, 512, 512, 8)) for routing in ("dynamic", "em")]
    assert images == [("encapnet-small", 32, 32), ("encapnet-small", 8, 128)]


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
    return bench.costs(steps, CPU)


def test_costs_are_found_for_a_keyword_that_is_a_tuple():
    config = make_config(dataset="cifar10", set={"depths": (1, 1, 1, 1)})
    line = {"model": "encapnet", "set": {"depths": [1, 1, 1, 1]}, "image_size": config.image_size,
            "amp": False, "compile": False, "channels_last": False, "batch": 8}
    assert bench.costs_of(config, [line, {**line, "set": {}}, {"model": "encapnet"}]) == [line]


@pytest.mark.speed
@pytest.mark.parametrize("routing, batch, faster, leaner", ROUTING)
def test_speed_of_routing_without_votes(routing, batch, faster, leaner):
    ours, votes = routing_costs(routing, ("factored", "votes"), batch, bench.TABLE_1)
    assert votes[0] > faster * ours[0] and votes[1] > leaner * ours[1]


@pytest.mark.speed
@pytest.mark.parametrize("routing, limit", [("dynamic", 500), ("em", 1500)])
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
    ours, theirs = bench.timed(*(bench.divergence_step(function, 128, 16, device=CPU)
                                 for function in (bench.OURS, bench.divergences()[name])))
    assert theirs > faster * ours


@pytest.mark.speed
@pytest.mark.parametrize("types, faster, compiled", [(8, 1.35, 1.6), (32, 1.15, 1.2)])
def test_speed_of_encapnet(types, faster, compiled):
    """Over a type a group; and over eager steps --compile gains at 8 types alone."""
    steps = bench.network_steps(CPU, types=types, batch=64)
    seconds = dict(zip(steps, bench.timed(*steps.values()), strict=True))
    ours, plain = seconds["without feedback"], seconds["a type a group"]
    assert plain > faster * ours and plain > compiled * seconds["--compile"]
    assert types == 32 or ours > 1.15 * seconds["--compile"]
    assert seconds["1 unit a module"] < 1.25 * ours
