"""The benches compare equal functions, run, and (pytest -m speed) reach the ratios of the README.

Timings prove nothing on a busy machine: the ratios are asserted on request only.
"""
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

import encapnet
import train
from lab import bench

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


def test_exponent_is_the_power():
    assert bench.exponent((1, 2, 4, 8), [3 * n ** 1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_extra_memory_is_the_peak_of_this_call():
    torch.zeros(50_000_000).add_(1)                                      # an older, higher peak
    found = bench.extra_memory(lambda: torch.zeros(10_000_000).add_(1), CPU)
    assert found == pytest.approx(40e6, rel=0.05)


def process_and_memory(step, device):
    return os.getpid(), bench.extra_memory(step, device)


def test_costs_come_from_a_process_of_their_own():
    cases = [(bench.routing_step, "dynamic", "votes", n, TINY) for n in (1, 64)]
    (here, small), (process, memory) = bench.in_a_process(
        bench.costs_here, process_and_memory, cases, CPU)
    assert here == process != os.getpid()
    assert memory > 64 * 32 * 16 * 16 * 4 > small                       # the votes themselves


def test_the_smallest_case_also_warms_up():
    made = []
    def maker(n, device):
        made.append(n)
        return n
    found = bench.costs_here(lambda step, device: 10 * step, [(maker, 1), (maker, 4)], CPU)
    assert found == [10, 40] and made == [1, 1, 4]


def test_a_time_is_the_median_after_a_first_call_of_steps_in_turn(monkeypatch):
    """Noise in one round moves no result; the first, in which all is set up, is not in it."""
    clock = iter([90, 80, 1, 10, 1, 10, 50, 70, 2, 20, 3, 30])
    monkeypatch.setattr(bench, "once", lambda step, device: step() or next(clock))
    called = []
    found = bench.timed_in_turn({name: partial(called.append, name) for name in "ab"}, CPU, 180)
    assert found == {"a": 2, "b": 20} and called == list("ab") * 6
    clock = iter([9, 7])
    assert bench.timed(lambda: None, CPU, budget=1) == 7                 # a long one: twice


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


@pytest.mark.parametrize("units", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_forms_of_the_network_are_what_they_are_called(units, compiled, counted, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(net) or net)
    seen = counted(encapnet.FeedbackUnit, "generate")
    small = dict(types=2, depths=(1, 1), dims=(1, 2, 2), feedback=units)
    step = bench.network_step("encapnet", small, 2, 32, compiled, CPU)
    seen.clear()
    step()
    assert len(seen) == 2 * units and len(calls) == compiled


def test_every_peer_of_the_divergence_is_called(at_once, monkeypatch):
    shapes = {}
    def noting(name):
        return lambda x, y: shapes.setdefault(name, []).append(x.shape) or (x * y).sum((-1, -2))
    monkeypatch.setattr(bench, "OURS", noting("ours"))
    monkeypatch.setattr(bench, "divergences", lambda: {"peer": noting("peer")})
    bench.bench_sinkhorn(CPU, 8, 4, 3)
    assert set(shapes["peer"]) == {(8, 4)} and set(shapes["ours"]) == {(1, 8, 4), (3, 8, 4), (8, 4)}
    assert shapes["ours"].count((8, 4)) == 3 * shapes["ours"].count((3, 8, 4))


@pytest.fixture
def at_once(monkeypatch, tmp_path):
    """One call a measurement, in this process, into an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "in_a_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(bench, "once", lambda step, device: (step(), 100.0)[1])


def results():
    return [json.loads(line) for line in Path("runs/results.jsonl").read_text().splitlines()]


def speed_lines():
    return [line["speed"] for line in results()]


def test_routing_in_miniature(at_once):
    """Every batch of every form beside its peer's, where there is one."""
    bench.bench_routing(CPU, [("layer", "em", TINY, {"factored": (1, 4), "votes": (1,)})])
    first, last = speed_lines()
    assert [line["what"] for line in (first, last)] == ["layer, batch 1", "layer, batch 4"]
    assert first["instead"] == "votes" and first["seconds"] and first["MB"] is not None
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


def test_network_in_miniature(at_once):
    bench.bench_network(CPU, 2, dict(types=2, depths=(1,), dims=(1, 2)))
    assert [line["instead"] for line in speed_lines()] == [
        "--compile", "1 unit a module", "2 units a module"]


def test_growth_is_of_the_curve_and_axis_that_it_says(monkeypatch, tmp_path):
    """Seconds that are the number of samples and bytes that are its square."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "costs", lambda cases, device: [(n, n ** 2) for _, _, n, _ in cases])
    sweeps = [sweep for sweep in bench.SWEEPS if sweep[1] == "samples"]
    bench.bench_scaling(CPU, sweeps)
    lines = [line["scaling"] for line in results()]
    assert [(line["of"], line["what"], line["against"]) for line in lines] == [
        ("Sinkhorn", unit, "samples of a divergence") for unit in ("seconds", "bytes")]
    assert [line["exponent"] for line in lines] == pytest.approx([1, 2])
    assert lines[1]["measured"] == [n ** 2 for n in lines[1]["values"]]
    assert Path("runs/scaling.png").stat().st_size > 10_000


def test_every_case_of_growth_is_what_its_axis_says(monkeypatch):
    """Built, not run: the layer's batch, capsules and iterations, the network's batch and side."""
    layers, images = [], []
    monkeypatch.setattr(bench, "training_step", lambda config, device: (images.append(
        (config.model, config.batch_size, config.image_size)), None))
    monkeypatch.setattr(bench, "routing_step", None)
    for _, keyword, values, curves in bench.SWEEPS:
        for name, case in curves.items():
            maker, *arguments = case(**{keyword: values[-1]})
            if name == "EncapNet":
                maker(*arguments, CPU)
            elif name != "Sinkhorn":
                routing, _, batch, shape = arguments
                layers.append((routing, batch, shape["types"] * shape["positions"], shape["out"],
                               shape["iterations"]))
    assert layers == [(routing, *sizes) for sizes in (
        (32, 512, 512, 3), (4, 1024, 1024, 3), (4, 512, 512, 8)) for routing in ("dynamic", "em")]
    assert images == [("encapnet-small", 32, 32), ("encapnet-small", 8, 128)]


def test_a_bench_needs_linux_or_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CLEAR_REFS", Path("/nowhere"))
    assert train.main(["--bench", "routing", "--device", "cpu"]) == 2
    assert "Linux" in capsys.readouterr().err


def test_bench_from_the_command_line(monkeypatch, capsys):
    called = []
    monkeypatch.setitem(bench.BENCHES, "sinkhorn", called.append)
    assert train.main(["--bench", "sinkhorn", "--device", "cpu"]) == 0 and called == [CPU]
    assert bench.main(["sinkhorn", "--device", "cpu"]) == 0 and called == [CPU] * 2
    assert train.main(["--bench", "speed"]) == 2
    assert "routing" in capsys.readouterr().err


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

@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROUTING = [("dynamic", 1, 4, 5), ("dynamic", 4, 10, 25), ("em", 1, 2, 12), ("em", 4, 5, 50)]


@pytest.mark.speed
@pytest.mark.parametrize("routing, batch, faster, leaner", ROUTING)
def test_speed_of_routing_without_votes(routing, batch, faster, leaner):
    ours, votes = (bench.costs([(bench.routing_step, routing, form, batch, bench.TABLE_1)], CPU)[0]
                   for form in ("factored", "votes"))
    assert votes[0] > faster * ours[0] and votes[1] > leaner * ours[1]


@pytest.mark.speed
@pytest.mark.parametrize("routing, limit", [("dynamic", 0.5e9), ("em", 1.5e9)])
def test_memory_at_batch_128(routing, limit):
    cases = [(bench.routing_step, routing, "factored", n, bench.TABLE_1) for n in (1, 128)]
    assert bench.in_a_process(bench.costs_here, bench.extra_memory, cases, CPU)[1] < limit


@pytest.mark.speed
@pytest.mark.parametrize("batch, faster", [(1, 0.95), (16, 1.5), (64, 1.5)])
def test_speed_of_digitcaps(batch, faster):
    ours, plain = (bench.costs_here(bench.timed, [(bench.routing_step, "dynamic", form, batch,
                                                   bench.DIGITCAPS)], CPU)[0]
                   for form in ("factored", "textbook code"))
    assert plain > faster * ours


@pytest.mark.speed
@pytest.mark.parametrize("name, faster", [("ot.sinkhorn", 2.5), ("geomloss", 3),
                                          ("POT batch, projection", 1.15)])
def test_speed_of_the_divergence(name, faster, one_thread):
    if name not in bench.divergences():
        pytest.skip("geomloss is not installed")
    peer = partial(bench.one_by_one, bench.divergences()[name])
    seconds = bench.sinkhorn_seconds({"peer": peer}, CPU)
    assert seconds["peer"] > faster * seconds["ours"]


@pytest.mark.speed
def test_speed_of_encapnet(one_thread):
    seconds = bench.network_seconds(CPU, 16)
    assert seconds["without feedback"] > 1.15 * seconds["--compile"]
    assert seconds["1 unit a module"] < 1.25 * seconds["without feedback"]
