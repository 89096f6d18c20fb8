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
    small, big = ((bench.routing_step, "dynamic", "votes", n, bench.TINY) for n in (1, 64))
    (process, memory), = bench.apart(process_and_memory, [small, big], CPU)
    assert process != os.getpid() and memory > 64 * 32 * 16 * 16 * 4    # the votes themselves


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
                                                   ("textbook", 0, 1)])
def test_forms_of_routing_are_what_they_are_called(form, built, textbook, counted):
    votes = counted(encapnet.RoutedCapsules, "votes")
    loops = counted(bench, "textbook_routing")
    bench.routing_step("dynamic", form, 2, bench.TINY, CPU)()
    assert (len(votes), len(loops)) == (built, textbook)


@pytest.mark.parametrize("units", [0, 1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_forms_of_the_network_are_what_they_are_called(units, compiled, counted, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda net: calls.append(net) or net)
    seen = counted(encapnet.FeedbackUnit, "generate")
    small = dict(types=2, depths=(1, 1), dims=(1, 2, 2), feedback=units)
    bench.network_step(small, compiled, 2, "encapnet", CPU)()
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
    monkeypatch.setattr(bench, "apart", lambda what, cases, device: [
        1.0 for _ in bench.costs_here(lambda step, device: step(), cases[1:], device)])
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(bench, "once", lambda step, device: (step(), 100.0)[1])


def speed_lines():
    lines = map(json.loads, Path("runs/results.jsonl").read_text().splitlines())
    return [line["speed"] for line in lines if "speed" in line]


def test_routing_in_miniature(at_once, monkeypatch):
    monkeypatch.setattr(bench, "DIGITCAPS", bench.TINY | dict(positions=1))
    bench.bench_routing(CPU, (1,), bench.TINY)
    assert [line["instead"] for line in speed_lines()] == ["votes"] * 2 + ["textbook code"] * 3


def test_sinkhorn_in_miniature(at_once):
    bench.bench_sinkhorn(CPU, 8, 4, 2)
    assert speed_lines()[0]["instead"] == "ot.sinkhorn"


def test_network_in_miniature(at_once):
    bench.bench_network(CPU, 2, "encapnet", dict(types=2, depths=(1,), dims=(1, 2)))
    assert [line["instead"] for line in speed_lines()] == [
        "--compile", "1 unit a module", "2 units a module"]


def test_scaling_in_miniature(at_once):
    sweeps = [("batch", (1, 2), bench.capsules_step, {"EM": lambda n: ("em", n, 1, 1)})]
    bench.bench_scaling(CPU, sweeps)
    assert Path("runs/scaling.png").stat().st_size > 10_000


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


# The targets, least ratio of time and of memory: pytest -m speed, on a quiet machine

ROUTING = [("dynamic", 1, 4, 5), ("dynamic", 4, 10, 25), ("em", 1, 2, 12), ("em", 4, 5, 50)]


@pytest.mark.speed
@pytest.mark.parametrize("routing, batch, faster, leaner", ROUTING)
def test_speed_of_routing_without_votes(routing, batch, faster, leaner):
    warm = (bench.routing_step, routing, "factored", 1, bench.TINY)
    ours, votes = (bench.costs([warm, (bench.routing_step, routing, form, batch, bench.TABLE_1)],
                               CPU)[0] for form in ("factored", "votes"))
    assert votes[0] > faster * ours[0] and votes[1] > leaner * ours[1]


@pytest.mark.speed
@pytest.mark.parametrize("routing, limit", [("dynamic", 0.5e9), ("em", 1.5e9)])
def test_memory_at_batch_128(routing, limit):
    case = (bench.routing_step, routing, "factored", 128, bench.TABLE_1)
    assert bench.costs([(bench.routing_step, routing, "factored", 1, bench.TINY), case],
                       CPU)[0][1] < limit


@pytest.mark.speed
@pytest.mark.parametrize("batch, faster", [(1, 0.95), (16, 1.5), (64, 1.5)])
def test_speed_of_digitcaps(batch, faster):
    ours, plain = (bench.costs_here(bench.timed, [(bench.routing_step, "dynamic", form, batch,
                                                   bench.DIGITCAPS)], CPU)[0]
                   for form in ("factored", "textbook"))
    assert plain > faster * ours


@pytest.mark.speed
@pytest.mark.parametrize("name, faster", [("ot.sinkhorn", 2.5), ("geomloss", 3),
                                          ("POT batch, projection", 1.15)])
def test_speed_of_the_divergence(name, faster):
    if name not in bench.divergences():
        pytest.skip("geomloss is not installed")
    peer = partial(bench.one_by_one, bench.divergences()[name])
    seconds = bench.sinkhorn_seconds({"peer": peer}, CPU)
    assert seconds["peer"] > faster * seconds["ours"]


@pytest.mark.speed
def test_speed_of_encapnet():
    seconds = bench.network_seconds(CPU, 16)
    assert seconds["without feedback"] > 1.15 * seconds["--compile"]
    assert seconds["1 unit a module"] < 1.25 * seconds["without feedback"]
