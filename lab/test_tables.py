"""Tables and figures: a cell is the result of the run that its row and column name."""
import dataclasses
import functools
import json
import math
import re
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.models
from matplotlib.colors import to_rgb
from PIL import Image

import encapnet
import train
from conftest import agreement_by_hand, assert_one_line, state_of
from lab import bench, figures, fit, tables
from lab.config import make_config
from lab.fit import make_model
from lab.measure import agreement
from lab.paper import SGD_RATE, TABLES, asked_parts, part_cells, row_config
from lab.results import as_json, config_key, read_results, record
from lab.runtime import Diverged, Problem
from lab.tables import run_missing, summary

# ---- Tables, figures, report, bench in miniature -------------------------------------------------

MINIATURE = "--dataset folder --epochs 1 --train-images 8 --test-images 6 --batch-size 4"


@pytest.fixture
def quick(monkeypatch):
    """No picture of each run; no second in which to time; Table 1's processes are this one."""
    monkeypatch.setattr(fit, "draw_run", lambda *run: None)
    monkeypatch.setattr(bench, "bench_step", functools.partial(bench.bench_step, seconds=0))


def numbers(text, row):
    """The cells of a Markdown row."""
    return [c.strip() for line in text.splitlines() if line.startswith(f"| {row}")
            for c in line.strip("|").split("|")[1:]]


def test_a_table_runs_and_stands_beside_the_papers(cli, quick):
    table = f"--table 5 {MINIATURE} --set types=1 --row 4"
    done = cli(table)
    assert done.code == 0, done
    text = done.out[done.out.index("**Table"):]
    cells = numbers(text, "4")
    assert cells[0] == "14.25" and re.search(r"\d|fail", cells[1]), cells
    assert "1 seed, 1 epoch, CPU" in cells[-1] and len(cells) == 3    # other data: no difference
    assert "--- 4, pictures, seed 0\n" in done.out                     # nor the paper's data
    assert text.count("**Table 5") == 1 and text.count("\n| ") == 3    # no row that was not asked
    again = cli(table)
    assert again.code == 0 and "---" not in again.out.split("**Table")[0]     # nothing run twice
    assert again.out[again.out.index("**Table"):] == text


# ---- A row builds what it is called --------------------------------------------------------------

USUAL = dict(coefficients="both", skips="I II", aide=(5, 3), units=0, divergence="ot",
             bias_fix=True, plan_grad=False, extractor=True,
             generator="capsule", cost="cosine", eps=0.1, lam=10.0)
BARE, UNIT = dict(skips=""), dict(units=1)
TABLE_3 = {    # what tells a row from EncapNet with both skips and no unit
    "(1)": dict(BARE, coefficients=None, aide=(None, None)), "(2)": dict(BARE, coefficients="own"),
    "(3)": dict(BARE, coefficients="cross"), "(4)": BARE, "(5)": dict(skips="I"),
    "(6)": dict(skips="II"), "(7)": {}, "(8)": dict(units=2), "(a)": {},
    "(b)": dict(UNIT, divergence="kl"), "(c)": UNIT, "(d1)": dict(UNIT, bias_fix=False),
    "(d2)": dict(UNIT, plan_grad=True), "(d3)": dict(UNIT, extractor=False),
    "(d4)": dict(UNIT, generator="vanilla"), "(d5)": dict(UNIT, cost="l2"),
    "aide kernel 3": dict(aide=(3, 3)), "aide kernel 7": dict(aide=(7, 7)),
    "both coefficients fixed at 1": dict(coefficients="fixed"),
    "OT loss, lambda 0.1": dict(UNIT, lam=0.1),
    "OT loss, lambda 1": dict(UNIT, lam=1.0),
    "OT loss, lambda 20, l2,": dict(UNIT, lam=20.0, cost="l2", eps=1.0, generator="vanilla")}


def cells_of(part):
    return [(*cell, config) for cell, config in part_cells(part, {}).items()]


def ablations_of(config):
    """What is built, in the words of USUAL."""
    net = make_model(config, 10, 3)
    module, layers = net.blocks[0], [m for m in net.modules() if isinstance(m, encapnet.CapConv)]
    coefficients, = {m.coefficients for m in layers}
    aides = {(m.master.weight.shape[-1], m.aide.weight.shape[-1] if m.coefficients else None)
             for m in layers}                                          # every layer is alike
    skips = " ".join(["I"] * (module.type_I.skip is not None) + ["II"] * module.type_II_skip)
    built = dict(coefficients=coefficients, aide=tuple(dict(aides)[kernel] for kernel in (3, 1)),
                 skips=skips, lam=config.lam)
    assert len(aides) == 2
    return built | units_of(net)


def units_of(net):
    """What feedback units are built, in the words of USUAL."""
    built = dict(units=len(net.units) // len(net.blocks))
    for unit in net.units:
        built |= {name: unit.sinkhorn[name] for name in ("eps", "cost", "bias_fix", "plan_grad")}
        built |= dict(divergence=unit.divergence, extractor=unit.extractor is not None,
                      generator="capsule" if unit.types else "vanilla")
    return built


def test_rows_of_table_3_build_what_they_are_called():
    small = {"set": dict(types=2, depths=(2, 1), dims=(1, 2, 2))}
    cells = [(row, config) for part in TABLES["3"]
             for (row, column), config in part_cells(part, small).items() if column == "EncapNet"]
    assert len(cells) == len(TABLE_3)
    for row, config in cells:
        changed, = (changes for name, changes in TABLE_3.items()
                    if row == name or row.startswith(f"{name} "))
        assert ablations_of(config).items() <= (USUAL | changed).items(), row


def test_the_resnet_column_of_table_3_is_the_same_change_to_resnet18():
    called = {"(a)": dict(units=0), "(b)": dict(units=1, divergence="kl", cost="cosine"),
              "(c)": dict(units=1, divergence="ot", cost="cosine", bias_fix=True, plan_grad=False,
                          extractor=True)}
    cells = [(row, config) for (row, column), config in
             part_cells(TABLES["3"][1], {"set": {"types": 1}}).items() if column == "ResNet"]
    assert len(cells) == len(called)
    for row, config in cells:
        net = make_model(config, 10, 3)
        assert type(net) is encapnet.ResNet and [1 + len(m.rest) for m in net.blocks] == 4 * [2]
        assert called[row[:3]].items() <= units_of(net).items(), row
        assert (config.lam, config.loss, config.dataset) == (10, "ce", "cifar10")


TABLE_4 = {    # row: model, side of the images, augmentation
    "EncapNet v1": ("encapnet", 128, "none"), "EncapNet v2": ("encapnet-v2", 128, "none"),
    "EncapNet v3": ("encapnet-v3", 224, "none"), "EncapNet v3+": ("encapnet-v3", 224, "+"),
    "EncapNet v3++": ("encapnet-v3", 224, "++"), "EncapNet-18": ("encapnet", 224, "++"),
    "WRN": ("wide_resnet101_2", 224, "++"), "ResNet-101": ("resnet101", 224, "++"),
    "VGG": ("vgg16", 224, "++"), "GoogleNet": ("googlenet", 224, "++")}
SMALL_4 = {"EncapNet": "none", "EncapNet+": "+", "EncapNet++": "++"}


def test_rows_of_table_4_are_what_they_are_called():
    small, hard, whole = (cells_of(part) for part in TABLES["4"])
    assert {(row, column) for row, column, _ in small} == {
        (row, name) for row in SMALL_4 for name in ("cifar10", "cifar100", "svhn")}
    for row, column, config in small:
        assert (config.dataset, config.model, config.image_size, config.augment) == (
            column, "encapnet", 32, SMALL_4[row])
        assert config.flip == (row == "EncapNet++" and column != "svhn")   # numbers have a side
        assert config.epochs == (900 if row == "EncapNet++" else 600)
        assert not config.train_images and not config.test_images and not config.set
    assert [len(hard), len(whole)] == [9, 4]
    for cells, dataset in ((hard, "h-imagenet"), (whole, "imagenet")):
        for row, _, config in cells:
            assert (config.model, config.image_size, config.augment) == TABLE_4[row]
            assert config.dataset == dataset and config.flip == (config.augment == "++")


@pytest.mark.parametrize("name", ["wide_resnet101_2", "resnet101", "vgg16", "googlenet"])
def test_peers_of_table_4_are_torchvisions_networks(name):
    with torch.device("meta"):
        net = make_model(make_config(dataset="imagenet", model=name), 1000, 3)
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    assert sum(p.numel() for p in net.parameters()) == published


@pytest.mark.parametrize("side, stem", [(32, 32), (64, 64), (127, 127), (128, 32), (224, 56)])
def test_encapnets_stem_has_stride_4_from_128_pixels_on(side, stem):
    few = dict(types=2, depths=(1,), dims=(1, 1))
    config = make_config(dataset="folder", model="encapnet", image_size=side, set=few)
    assert make_model(config, 3, 3).stem(torch.zeros(1, 3, side, side)).shape[-1] == stem
    config = make_config(dataset="folder", model="encapnet", image_size=side,
                         set={**few, "stem_stride": 2})                # unless asked for
    assert make_model(config, 3, 3).stem(torch.zeros(1, 3, side, side)).shape[-1] == (side + 1) // 2
    assert make_config(dataset="folder", model="resnet18", image_size=side).set == {}


def test_rows_of_tables_1_and_5_are_what_they_are_called():
    part, = TABLES["1"]
    models = [(row[:3], config.model, config.dataset)
              for (row, _), config in part_cells(part, {}).items()]
    names = ["capnet-dynamic", "capnet-em", "cnn-same", "cnn-similar", "encapnet6-master",
             "encapnet6"]
    assert sorted(models) == sorted((f"({letter})", name, data) for letter, name in
                                    zip("abcdef", names, strict=True)
                                    for data in ("cifar10", "mnist"))
    iterations, starts, losses = (cells_of(part) for part in TABLES["5"])
    assert all(make_model(config, 10, 3).routed[0].iterations == int(row)
               for row, _, config in iterations) and len(iterations) == 4
    assert [config.set["b_init"] for _, _, config in starts] == [row for row, *_ in starts]
    called = {"spread, fix m": "spread-fixed", "spread": "spread", "margin": "margin",
              "CE loss": "ce"}
    assert all((called[row], column.lower()) == (config.loss, config.optimizer)
               for row, column, config in losses) and len(losses) == 12


@pytest.mark.slow
@pytest.mark.parametrize("number", ["1", "3", "4", "5"])
def test_a_whole_table_in_miniature(number, cli, quick):
    done = cli(f"--table {number} {MINIATURE} --set types=4")
    assert done.code == 0, done
    for block in done.out[done.out.index("**Table"):].split("**Table")[2 if number == "1" else 1:]:
        for line in block.splitlines():
            if line.startswith("| ") and "---" not in line and not line.endswith("how |"):
                assert "seed" in line, line


def test_table_1_measures_cost(cli, quick):
    text = cli(f"--table 1 {MINIATURE} --set types=1 --row '(c)'").out
    cost = numbers(text, "(c) vanilla CNN, same shape")
    assert cost[0] == "128" and float(cost[2]) < 24.44 and "CPU" in cost[7], cost
    lines = map(json.loads, Path("runs/results.jsonl").read_text().splitlines())
    benches = [line["bench"] for line in lines if "bench" in line]
    assert [b["batch_size"] for b in benches] == [128]


def test_table_1_measures_a_cost_once_per_device(cli, faked, monkeypatch):
    faked()
    measured, here = [], {}

    def measure(config):
        measured.append((config.model, config.batch_size, here["device"]))
        record({"bench": {**as_json(config, bench.COST), **here, "memory_MB": 1.,
                          "forward_backward_seconds": 1.}})
    monkeypatch.setattr(bench, "bench_step", measure)
    monkeypatch.setattr(tables, "environment", lambda device: here)
    for name in ("a card", "a card", "another"):
        here["device"] = name
        assert cli("--table 1 --row '(c)' '(b)'").code == 0
    assert measured == [("capnet-em", 4, "a card"), ("cnn-same", 128, "a card"),
                        ("capnet-em", 4, "another"), ("cnn-same", 128, "another")]


def test_under_torchrun_table_1_runs_without_its_costs(cli, faked, monkeypatch):
    """A step there is of all processes, its batch divided."""
    asked = faked()
    monkeypatch.setattr(bench, "bench_step", lambda *given: pytest.fail("measured"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli(f"--table 1 {MINIATURE} --row '(c)'")
    assert done.code == 0 and len(asked) == 1, done


def test_table_2_is_the_built_network(cli):
    out = cli("--table 2").out.splitlines()
    for model, layers, sizes in (("encapnet", "4 CapConv", "512 x 4 x 4"),
                                 ("resnet18", "2 ResidualBlock", "512 x 4 x 4")):
        block = out[out.index(f"**Table 2: {model}.**"):]
        assert block[8].startswith(f"| M4 | {layers} | {sizes} |"), block
    small = cli("--table 2 --set types=2 --set depths=(1,1) --set dims=(1,2,4)").out
    # Type I: master, aide of 5x5, coefficients and their bias, skip, BatchNorm; then type II
    first = 4 * 1 * 9 + 4 * 1 * 25 + 2 * 4 * 2 * 9 + 4 + 4 * 2 * 9 + 2 * 4
    first += 4 * 2 * 1 + 4 * 2 * 9 + 2 * 4 * 2 * 9 + 4 + 2 * 4
    second = 8 * 2 * 9 + 8 * 2 * 25 + 2 * 4 * 4 * 9 + 4 + 8 * 4 * 9 + 2 * 8
    second += 8 * 4 * 1 + 8 * 4 * 9 + 2 * 4 * 4 * 9 + 4 + 2 * 8
    for name, *cells in (("M0", "convolution", "2 x 32 x 32", "58"),
                         ("M1", "2 CapConv", "4 x 32 x 32", f"{first:,}"),
                         ("M2", "2 CapConv", "8 x 16 x 16", f"{second:,}"),
                         ("classes", "CapFC", "10", f"{2 * 256 * 4 * 10:,}")):
        assert numbers(small.split("**Table 2: resnet18")[0], name) == cells


# ---- The runner: what is known is not run again --------------------------------------------------

def result(config, seed=None, **values):
    """A line of results.jsonl, as fit gives it."""
    return {"seed": config.seed if seed is None else seed, "error": 10.0,
            "top5_error": 5.0, "outcome": "ok", "epochs": config.epochs, "seconds": 60.0,
            "data": config.dataset, "model": config.model,
            "config": dataclasses.asdict(config),
            "environment": {"device": "H100", "command": "python train.py --table"}, **values}


@pytest.fixture
def faked(monkeypatch):
    """faked(outcome) puts outcome(config) -> more of a result, in place of training."""
    asked = []

    def put(outcome=lambda config: {}):
        monkeypatch.setattr(tables, "fit", lambda config: asked.append(config) or
                            result(config, **outcome(config)))
        return asked
    return put


def test_a_known_result_is_never_run_again_an_unknown_seed_is(faked, place, monkeypatch):
    monkeypatch.chdir(place)
    asked, config = faked(), make_config(dataset="mnist", lr=1e-3)
    other = make_config(dataset="mnist", lr=1e-2)
    runs = {(config_key(config), 0): "known", (config_key(other), 1): "another's"}
    assert run_missing({("one", ""): config}, 3, runs) == []
    assert [c.seed for c in asked] == [1, 2] and {config_key(c) for c in asked} == \
        {config_key(config)}
    assert runs[config_key(config), 0] == "known"                      # and is left alone
    assert [runs[config_key(config), seed]["seed"] for seed in (1, 2)] == [1, 2]
    assert run_missing({("one", ""): config}, 3, runs) == [] and len(asked) == 2
    assert len({c.output_dir for c in asked}) == 2                     # a folder a seed


def test_seeds_are_counted_from_seed(cli, faked):
    asked = faked()
    assert cli("--table 5 --row learnable --seed 3 --seeds 2").code == 0
    assert [config.seed for config in asked] == [3, 4]


@pytest.mark.parametrize("several", [False, True])
def test_a_runs_last_words_are_of_its_last_epoch(several, cli, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda config: result(
        config, error=12.5, epochs=3, seconds=83, folder="there", unbalanced=False,
        multi_crop=several, curves={"test_error": [30.0, 10.0, 14.0]}))
    crops = ", mean over several crops," if several else ""
    assert f"\ntest error 12.50 %{crops} after 3 epochs and 1m23s\n" in "\n" + cli().out


def test_a_run_that_diverged_is_recorded_and_not_tried_again(place, monkeypatch):
    monkeypatch.chdir(place)
    tried, config = [], make_config(dataset="mnist")

    def diverge(config):
        tried.append(config)
        raise Diverged("NaN at step 1; stopped")
    monkeypatch.setattr(tables, "fit", diverge)
    for _ in range(2):
        runs, *_ = read_results()
        assert run_missing({("one", ""): config}, 1, runs) == []
        assert summary(config, 14.28, runs)[0] == ("14.28", "fail (NaN at step 1)", "–")
    assert len(tried) == 1


def test_failing_rows_are_reported_and_the_others_go_on(cli, faked):
    def fail(config):
        if config.model == "resnet18":
            raise Problem(f"width must be a number {'x' * 200} the way out")
        return {}
    faked(fail)
    done = cli("--table 3 --row '(b) KL'")
    assert_one_line(done, "1 run failed", "ResNet", "width", "the way out", code=1)
    cells = numbers(done.out, "(b) KL loss")
    assert cells[1] == "10.00" and "1 seed" in cells[-1] and cells[4] == "–"


def test_a_table_that_is_asked_to_stop_stops(cli, faked):
    def stop(config):
        raise Problem("stopped by SIGTERM", 128 + 15)
    asked = faked(stop)
    assert_one_line(cli("--table 5"), "SIGTERM", code=143)
    assert len(asked) == 1


@pytest.mark.parametrize("errors, shown", [
    ([10.0], "10.00"), ([10.0, 12.0, 17.0], "13.00 ± 3.61"), ([9.0, 9.0], "9.00 ± 0.00")])
def test_a_cell_is_the_mean_and_the_deviation_of_its_seeds(errors, shown):
    """With n - 1, as of a sample; minus the paper's number, in which a plus is worse."""
    config, other = make_config(dataset="cifar10"), make_config(dataset="cifar10", lr=1.0)
    runs = {(config_key(c), seed): result(c, seed, error=error + 50 * (c is other))
            for c in (config, other) for seed, error in enumerate(errors)}
    mean = statistics.mean(errors)
    plural = "s" * (len(errors) > 1)
    assert summary(config, 14.28, runs) == (
        ("14.28", shown, f"{mean - 14.28:+.2f}"),
        (f"{len(errors)} seed{plural}", "600 epochs", "H100"))
    assert summary(config, None, runs)[0] == ("–", shown, "–")
    assert summary(config, "fail", runs)[0] == ("fail", shown, "–")
    runs[config_key(config), 9] = result(config, 9, outcome="at chance", error=90.0)
    failed = f"1 of {len(errors) + 1} fail (at chance)"
    assert summary(config, 14.28, runs)[0] == ("14.28", failed, "–")
    for never in (make_config(dataset="cifar10", lr=2.0), None):
        assert summary(never, 14.28, runs) == (("14.28", "–", "–"), ())


def test_a_tables_set_reaches_the_networks_that_have_it():
    given = dict(set={"types": 8, "depths": (1,), "blocks": (1, 2), "tipes": 3})
    narrow = {name: row_config(dict(model=name), given).set
              for name in ("encapnet", "resnet18", "cnn-similar")}
    assert narrow == {"encapnet": {"types": 8, "depths": (1,), "tipes": 3},
                      "resnet18": {"width": 0.25, "blocks": (1, 2), "tipes": 3},
                      "cnn-similar": {"width": 0.25, "tipes": 3}}


# ---- Figures -------------------------------------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures_, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figures_.append(figure) or
                        save(figure, path))
    return figures_


def test_every_curve_of_figure_4_is_its_own_rows_of_table_3(cli, drawn):
    """By legend, in its network's panel, one look a kind; the mean over seeds, epoch by epoch."""
    first = {("(a)", "EncapNet"): 1, ("(c)", "EncapNet"): 11, ("(a)", "ResNet"): 101,
             ("(c)", "ResNet"): 111}                                   # others: no such curve
    published(*(result(config, seed, curves={"loss": [
        first.get((row[:3], column), 999) + seed - 1 - epoch / 2 for epoch in range(4)]})
        for row, column, config in cells_of(TABLES["3"][1]) for seed in range(3)))
    done = cli("--figure 4")
    assert done.code == 0, done
    with Image.open("runs/figure-4.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors()) > 10
    figure, = drawn
    start = {"EncapNet": 1, "EncapNet with OT": 11, "ResNet": 101, "ResNet with OT": 111}
    looks = {}
    for axis, network in zip(figure.axes, ("EncapNet", "ResNet"), strict=True):
        legend = {text.get_text(): handle for text, handle in zip(
            axis.get_legend().get_texts(), axis.get_legend().legend_handles, strict=True)}
        assert {line.get_label() for line in axis.lines} == {network, f"{network} with OT"}
        for line in axis.lines:
            label = line.get_label()
            first = start.pop(label)
            assert line.get_xdata().tolist() == [1, 2, 3, 4]
            assert line.get_ydata().tolist() == [first, first - 0.5, first - 1, first - 1.5]
            look = to_rgb(line.get_color()), line.get_linestyle()
            assert (to_rgb(legend[label].get_color()), legend[label].get_linestyle()) == look
            looks.setdefault("OT" in label, set()).add(look)
    assert not start and len(looks[True]) == len(looks[False]) == 1 and looks[True] != looks[False]


def moment(routing, epoch):
    """A histogram and lengths that name their routing and epoch; some bins are empty."""
    percent = [float((k + epoch + 7 * (routing == "em")) % 4) for k in range(20)]
    return {"epoch": epoch, "percent": percent,
            "length": [k + 0.1 * epoch + (routing == "em") / 2 for k in range(20)]}


def test_figure_2_draws_every_routing_and_moment_where_it_says(cli, drawn):
    published(*(result(config, seed, moments=[
        moment(config.model.removeprefix("capnet-"), epoch + seed) for epoch in (0, 60, 240, 600)])
        for row, column, config in cells_of(TABLES["1"][0]) if column == "cifar10"
        for seed in (1, 0)))                                           # the first one is drawn
    done = cli("--figure 2")
    assert done.code == 0 and Path("runs/figure-2.png").exists(), done
    axes = drawn[0].axes
    panels, twins = axes[:8], axes[8:]
    assert [axis.get_title() for axis in panels] == [
        f"{name}, epoch {epoch}" for name in ("Dynamic", "EM") for epoch in (0, 60, 240, 600)]
    (limits,) = {axis.get_ylim() for axis in panels}                   # one scale for all shares
    assert limits[0] == 0 and limits[1] > max(
        bar.get_height() for axis in panels for bar in axis.patches)
    for axis, twin in zip(panels, twins, strict=True):
        name, epoch = re.fullmatch(r"(\w+), epoch (\d+)", axis.get_title()).groups()
        expected = moment(name.lower(), int(epoch))
        assert [bar.get_height() for bar in axis.patches] == expected["percent"]
        edges = [bar.get_x() for bar in axis.patches] + [axis.patches[-1].get_x() + 0.1]
        assert edges == pytest.approx([-1 + 0.1 * k for k in range(21)])
        lengths = [length if percent else math.nan for length, percent in
                   zip(expected["length"], expected["percent"], strict=True)]
        np.testing.assert_array_equal(twin.lines[0].get_ydata(), lengths)
        np.testing.assert_allclose(twin.lines[0].get_xdata(), [-0.95 + 0.1 * k for k in range(20)],
                                   atol=1e-12)


class Toy(torch.nn.Module):
    """A routed layer alone; its last class capsule gets an opposite vote."""

    def __init__(self, routing):
        super().__init__()
        self.routing = routing
        first = encapnet.RoutedCapsules(2, 3, 7, 6, routing)           # not the one to look at
        self.routed = torch.nn.ModuleList(
            [first, encapnet.RoutedCapsules(2, 3, 4, 5, routing, bias=True)])
        torch.nn.init.normal_(self.routed[1].bias)

    def forward(self, u):
        assert not self.training
        a = (torch.full((len(u), u.shape[1] * u.shape[2]), 0.5),) if self.routing == "em" else ()
        return [layer(u, *a) for layer in self.routed][1]


@pytest.mark.parametrize("routing", ["dynamic", "em"])
def test_agreement_is_of_every_vote_for_the_true_class_with_its_capsule(routing):
    net, u, labels = Toy(routing), torch.randn(6, 2, 5, 3), torch.tensor([2, 0, 3, 3, 1, 2])
    out = net.eval()(u)
    v = (out[0] if routing == "em" else out).detach()
    percent, length = agreement_by_hand(net.routed[1], u, v, labels)
    found = agreement(net.train(), u, labels)
    np.testing.assert_allclose(found["percent"], percent, rtol=1e-6)
    np.testing.assert_allclose(found["length"], length, rtol=1e-5)


def test_figure_2s_moments_are_before_after_a_tenth_four_tenths_and_all_of_the_run(cli):
    """Of the test images: the first is the fresh network's, the last the finished one's."""
    words = MINIATURE.replace("--epochs 1", "--epochs 10").replace("--train-images 8",
                                                                   "--train-images 4")
    done = cli(f"{words} --recipe paper --model capnet-dynamic --set types=1 --output-dir run")
    assert done.code == 0, done
    moments = json.loads(Path("run/result.json").read_text())["moments"]
    assert [m["epoch"] for m in moments] == [0, 1, 4, 10]
    state, seen = state_of("run"), []
    config = make_config(**state["config"])
    data = fit.load_data(config, torch.device("cpu"))
    x = (data.test.images / 255 - data.mean.view(3, 1, 1)) / data.std.view(3, 1, 1)
    torch.manual_seed(config.seed)
    net = make_model(config, 3, 3).eval()
    net.routed[1].register_forward_hook(lambda layer, given, out: seen.append((given[0], out)))
    for found in (moments[0], moments[-1]):
        with torch.no_grad():
            net(x)
        percent, length = agreement_by_hand(net.routed[1], *seen[-1], data.test.labels)
        np.testing.assert_allclose(found["percent"], percent, atol=0.3)       # a vote is 0.26 %
        net.load_state_dict(state["net"])


def test_figure_4_runs_what_table_3_lacks_and_the_table_needs_it_no_more(cli, faked):
    asked = faked(lambda config: {"curves": {"loss": [2.0, 1.0]}})
    assert cli("--figure 4 --dataset digits --epochs 3").code == 0
    assert {(c.model, c.set["feedback"], c.dataset, c.epochs) for c in asked} == {
        (model, units, "digits", 3) for model in ("encapnet", "resnet18") for units in (0, 1)}
    published(*(result(config, config.seed) for config in asked))      # as fit records them
    assert cli("--table 3 --row '(a)' '(c) OT' --dataset digits --epochs 3").code == 0
    assert len(asked) == 4


@pytest.mark.parametrize("rank, drawn", [(0, True), (1, False)])
def test_one_process_of_several_draws_a_figure(rank, drawn, cli, faked, monkeypatch):
    monkeypatch.setenv("RANK", str(rank))
    faked(lambda config: {"curves": {"loss": [2.0, 1.0]}})
    assert cli("--figure 4").code == 0 and Path("runs/figure-4.png").exists() == drawn


def test_a_figure_without_results_says_so(cli):
    published(*(result(config, error=None, outcome="NaN at step 1")
                for row, _, config in cells_of(TABLES["3"][1]) if row[:3] in ("(a)", "(c)")))
    assert_one_line(cli("--figure 4"), "nothing to draw", "Table 3", code=1)


# ---- Rendering -----------------------------------------------------------------------------------

def published(*lines):
    Path("results").mkdir(exist_ok=True)
    Path("results/all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def reported(cli, *blocks):
    """README's blocks of these names, filled from results/ -> their texts."""
    Path("README.md").write_text("".join(f"<!-- {b} -->\nstale\n<!-- end -->\n" for b in blocks))
    assert cli("--report").code == 0
    text = Path("README.md").read_text()
    assert "stale" not in text
    return re.findall(r"^<!-- (?:table|runs|speed).*?-->\n(.*?)^<!-- end", text, re.M | re.S)


def test_every_cell_of_every_table_is_its_own_runs_result(cli):
    """A result of its own for every Config: ImageNet's rows show top-5 errors, all others top-1."""
    cells = {(number, part.title): cells_of(part)
             for number in "1345" for part in TABLES[number]}
    keys = sorted({config_key(config) for found in cells.values() for *_, config in found})
    errors = {key: 101.25 + n for n, key in enumerate(keys)}
    published(*{config_key(config): result(
        config, error=errors[config_key(config)], top5_error=errors[config_key(config)] + 0.5)
        for found in cells.values() for *_, config in found}.values())
    texts = reported(cli, *(f"table {number}" for number in "1345"))
    blocks = dict(re.findall(r"^\*\*Table (\d: .*?)\.\*\*.*?\n\n((?:\|.*\n)+)", "\n".join(texts),
                             re.M))
    for (number, title), found in cells.items():
        header, _, *rows = ([c.strip() for c in line.strip("|").split("|")]
                            for line in blocks[f"{number}: {title}"].splitlines())
        rows, filled = {row[0]: dict(zip(header, row, strict=True)) for row in rows}, 0
        part = next(p for p in TABLES[number] if p.title == title)
        for row, column, config in found:
            many = f"{column} " * (len({column for _, column, _ in found}) > 1)
            error = errors[config_key(config)] + 0.5 * title.endswith("top-5")
            shown, ours = rows[row], column if part.study else f"{many}ours"
            assert shown[ours] == f"{error:.2f}", (title, row, column)
            paper = next(p.get(column) for name, _, p in part.rows if name == row)
            if isinstance(paper, float):
                assert shown[f"{many}paper"] == f"{paper:.2f}"
                assert shown[f"{many}difference"] == f"{error - paper:+.2f}"
            filled += 1
        assert filled == sum(cell[:1].isdigit() for row in rows.values()
                             for name, cell in row.items() if name.endswith(ours.split()[-1]))


# Copied from the paper, part by part: two spaces separate rows; "-": the paper prints none
PRINTED = {
    "1": ["14.28 0.37 151.24 3961 8 .444  12.66 0.31 152.44 10078 4 .957  "
          "14.43 0.38 24.44 1652 128 .026  12.09 0.33 146.88 2420 128 .146  "
          "13.87 0.31 25.76 1433 128 .039  11.93 0.25 60.68 1755 128 .061"],
    "3": ["9.83  8.05  9.11  7.41  6.81  6.75  5.82  4.55",
          "5.82 8.03  5.31 7.72  4.58 7.67  4.71 -  4.77 -  5.79 -  5.01 -  4.90 -"],
    "4": ["4.55 26.77 2.01  3.13 24.01 1.64  3.10 24.18 1.52",
          "48.23  43.15  42.76  40.18  40.05  42.51  44.13  55.76  60.18",
          "7.51  7.89  8.43  6.21"],
    "5": ["14.79  14.41  14.28  14.25", "14.35  14.28  14.11",
          "15.61 15.38 14.97  15.02 14.87 14.50  14.30 15.18 14.28  14.76 fail 15.31"]}


@pytest.mark.parametrize("table", PRINTED)
def test_the_papers_figures_are_those_that_it_prints(table):
    parts = [part for part in TABLES[table] if not part.study]
    for part, printed in zip(parts, PRINTED[table], strict=True):
        found = [[paper.get(column) for column in part.columns] + [*paper.get("cost", ())]
                 for _, _, paper in part.rows]
        expected = [[float(word) if word[-1].isdigit() else {"-": None}.get(word, word)
                     for word in row.split()] for row in printed.split("  ")]
        assert found == expected, part.title


@pytest.mark.parametrize("words, shown", [
    ("--dataset cifar10 --lr 0.1", ["14.28", "10.00", "-4.28"]),
    ("--dataset cifar100", ["14.28", "10.00"]), ("--epochs 7", ["14.28", "10.00"]),
    ("--set types=4", ["14.28", "10.00"]), ("--train-images 9", ["14.28", "10.00"]),
    ("--test-images 9", ["14.28", "10.00"]), ("--hold-out", ["14.28", "10.00"]),
    ("--image-size 16", ["14.28", "10.00"])])
def test_a_difference_is_given_where_data_width_and_epochs_are_the_papers(words, shown, cli):
    _, given = train.parse(shlex.split(words))
    published(result(make_config(**{"dataset": "cifar10", "model": "capnet-dynamic", **given})))
    text, = reported(cli, f"table 1/2 {words}")
    cells = numbers(text, "(a) CapNet, dynamic")
    assert cells[:len(shown)] == shown
    assert ("difference" in text) == (len(shown) == 3)


def test_a_page_shows_the_rows_that_were_run_and_of_a_table_without_any_its_command(cli):
    """On a terminal every row is shown."""
    words = "4 --dataset cifar10 --epochs 3"
    nothing, = reported(cli, f"table {words}")
    assert nothing.count("|") == 0 and nothing.count("**Table 4: ") == 1    # ImageNet's keep to it
    assert nothing.rstrip().endswith(f"`python train.py --table {words}`")
    config = make_config(dataset="cifar10", model="encapnet", augment="+", epochs=3)
    published(result(config))
    some, one = reported(cli, f"table {words}", f"table 4/1 {words[2:]}")
    rows = [line.split("|")[1].strip() for line in some.splitlines() if line.startswith("| ")]
    assert rows == ["", "---", "EncapNet+"]
    assert one == some                                                 # with its command, too
    assert numbers(some, "EncapNet+")[:2] == ["3.13", "10.00"]
    both = cli("--table 4 --row Net+ --dataset cifar10 --epochs 3").out
    assert numbers(both, "EncapNet++")[:2] == ["3.10", "–"]
    assert "EncapNet++" not in cli("--table 4 --row EncapNet+ --dataset cifar10 --epochs 3").out


def test_every_column_tells_its_own_seeds_and_devices(cli):
    found = {name: make_config(dataset=name, model="capnet-dynamic") for name in
             ("cifar10", "mnist")}
    published(*(result(found["cifar10"], seed) for seed in (0, 1)),
              result(found["mnist"], environment={"device": "CPU", "command": ""}))
    text, = reported(cli, "table 1")
    assert "| 14.28 | 10.00 ± 0.00 | -4.28 | 0.37 | 10.00 | +9.63 |" in text
    assert "| 2 seeds / 1 seed, 600 epochs, H100 / CPU |" in text


@pytest.mark.parametrize("words, setting", [
    ("lambda", "Held-out error in %; digits at 32x32, 16,000 training images, every tenth held "
     "out."),
    ("routing", "Test error in %; mnist at 16x16, 6,000 training images, 2,000 test "
     "images, types=4."),
    ("routing --train-images 1 --test-images 0 --set types=8 --image-size 20",
     "Test error in %; mnist at 20x20, 1 training image, types=8."),
    ("5", "Test error in %; cifar10 at 32x32."),
    ("5 --hold-out", "Held-out error in %; ours: cifar10 at 32x32, every tenth held out."),
    ("1", "Test error in %; cifar10 at 32x32 and mnist at 32x32.")])
def test_a_caption_names_what_the_errors_are_of(words, setting):
    table, *flags = words.split()
    blocks = tables.render_table(table, train.parse(flags)[1], {}, [])
    captions = [block.split("\n")[0] for block in blocks if "**Table 1: cost" not in block]
    assert captions and all(caption.endswith(f".** {setting}") for caption in captions), captions


def test_a_row_of_a_study_tells_how_each_column_was_run_or_once_what_all_share(cli):
    """And a dash for what has not been."""
    cells = [config for (row, _), config in part_cells(TABLES["losses"][0], {}).items()
             if row == "margin"]
    published(*(result(cells[k], seed, epochs=epochs) for k, seed, epochs in (
        (0, 0, 60), (0, 1, 60), (1, 0, 30))))
    text, = reported(cli, "table losses/1")
    *shown, how = numbers(text, "margin")
    assert shown == ["10.00 ± 0.00", "10.00", "–"]
    assert how == "2 seeds / 1 seed, 60 epochs / 30 epochs, H100"


def test_costs_are_of_the_same_settings_and_device(cli):
    line = dict(model="cnn-same", set={}, image_size=32, amp=False, compile=False,
                channels_last=False, batch_size=128, parameters=10 ** 6, memory_MB=100.,
                forward_backward_seconds=1., device="H100")
    others = [{**line, "amp": True, "memory_MB": 1.}, {**line, "image_size": 64, "memory_MB": 2.},
              {**line, "model": "cnn-similar", "memory_MB": 3.},
              {**line, "batch_size": 4096, "memory_MB": 777.}]
    published(*({"bench": each} for each in (line, *others)))
    cells = numbers(reported(cli, "table 1")[0], "(c) vanilla CNN, same shape")
    assert cells[:8] == ["128", "24.44", "24.03", "1,652", "100", "0.026", "1.000", "H100"]


def test_table_1s_parameters_are_the_papers_but_for_two_rows():
    """16 bits each in 2^20 bits, counted from the built network, whether it was run or not."""
    text, = tables.render_table("1", {}, {}, [])[:1]
    apart = {"(a)": 0.002, "(b)": 0.002, "(c)": 0.02, "(d)": 0.002, "(e)": 0.002, "(f)": 0.25}
    for letter, bound in apart.items():
        batch, paper, ours, _, memory, _, seconds, device = numbers(text, letter)
        assert float(ours) == pytest.approx(float(paper), rel=bound), letter
        assert memory == seconds == device == "–"
    assert numbers(text, "(c)")[2] == f"{1574698 * 16 / 1048576:.2f}"    # 1,575,690 less 992 biases


@pytest.mark.parametrize("words, told", [
    ("--check", "--check"), ("--row x", "--row"), ("--seeds 3", "--seeds"),
    ("--table 3 --figure 4", "not allowed with"), ("--figure 4 --seeds 2", "--seeds"),
    ("--bench --seeds 2", "--seeds"), ("--list --seeds 2", "--seeds"),
    ("--table 3 --output-dir there", "--output-dir"),
    ("--figure 4 --output-dir there", "--output-dir"), ("--table 3 --resume", "--resume"),
    ("--table 2 --row x", "'x'")])
def test_flags_without_effect_are_refused(words, told, cli):
    assert_one_line(cli(words), told)


def test_report_renders_and_checks(cli):
    config = make_config(dataset="mnist", model="capnet-dynamic", set={"iterations": 4}, epochs=3)
    single = dict(environment={"device": "a CPU", "command": "python train.py --lr 1"}, seconds=83,
                  error=4.5, epochs=7)
    old = result(make_config(lr=2.0), **single)
    del old["config"]["clip"]                                          # from before the flag
    zero = make_config(dataset="mnist", model="capnet-dynamic", set={"b_init": "zero"}, epochs=3)
    published(result(config), result(zero), result(make_config(lr=1.0, clip=2.0), **single), old)
    with open("results/more.jsonl", "w") as file:                      # later lines win
        for ours, theirs in ((None, 5.0), (2.0, 6.0)):
            line = dict(what="squash", instead="loops", ours_seconds=0.002, ours_MB=ours,
                        seconds=theirs / 1000, MB=3.0, device="CPU, 1 thread")
            file.write(json.dumps({"speed": line}) + "\n")
    words = "5 --dataset mnist --epochs 3"
    Path("README.md").write_text(f"before\n<!-- table {words} -->\nstale\n<!-- end -->\nafter\n"
                                 "<!-- runs -->\n<!-- end -->\n<!-- speed -->\n<!-- end -->\n"
                                 f"<!-- table {words} --row random zero -->\n<!-- end -->\n")
    assert_one_line(cli("--report --check"), "does not agree", code=1)
    assert "stale" in Path("README.md").read_text()
    assert cli("--report").code == 0
    written = Path("README.md").stat().st_mtime_ns
    assert cli("--report --check").code == 0 and Path("README.md").stat().st_mtime_ns == written
    text = Path("README.md").read_text()
    assert text.startswith("before") and "after" in text and "stale" not in text
    assert numbers(text, "4") == ["14.25", "10.00", "1 seed, 3 epochs, H100"]
    assert f"--table {words}`" in text and f"--table {words} --row random zero`" in text
    rows = re.findall(r"^\| (?!---)(\S.*?) \|", text.split("--row random zero -->")[1], re.M)
    assert rows == ["zero"]
    assert text.count("| `python train.py --lr 1` | digits | 4.50 | 7 | 1m23s | a CPU |") == 2
    assert numbers(text, "squash") == [*"loops 2.0 6.0 3.00 2 3 1.50".split(), "CPU, 1 thread"]
    Path("README.md").write_text(text.replace("14.25", "14.26"))
    assert_one_line(cli("--report --check"), "does not agree", code=1)


def test_a_finished_run_can_be_published(cli, quick, monkeypatch):
    """Its line moves to results/ as it is, and the page has it."""
    monkeypatch.setattr(fit.measure, "at_chance", lambda run, error: False)
    assert cli(f"{MINIATURE} --model cnn-same --set width=0.1").code == 0
    Path("results").mkdir()
    Path("runs/results.jsonl").rename("results/runs.jsonl")
    Path("README.md").write_text("<!-- runs -->\n<!-- end -->\n")
    assert cli("--report").code == 0
    assert "` | pictures | " in Path("README.md").read_text()


def test_the_authors_logs_are_counted_in_table_1s_unit_beside_the_papers_own_rows():
    """On the page, whose figures are those of authors-logs.jsonl."""
    results = Path(train.__file__).parent / "results"
    page = (results / "README.md").read_text()
    rows = page.split("| log, commit |\n")[1].split("\n\n")[0].splitlines()[1:]
    logs = {row.split("`")[-2]: numbers(row, "") for row in rows}
    lines = list(map(json.loads, (results / "authors-logs.jsonl").read_text().splitlines()))
    assert len(lines) == len(rows) == len(logs)
    for line in lines:
        shown = logs[line["log"]]
        assert line["what"] in rows[lines.index(line)] and line["commit"] in shown[-1]
        assert int(shown[0].replace(",", "")) == round(line["parameters_MiB_float32"] * 2 ** 18)
        assert [shown[2], shown[-2]] == [str(line["epochs_logged"]), line["paper"] or "–"]
        assert shown[3:6] == ["–" if error is None else f"{error:.2f}" for error in (
            line[f"{kind}_error"] for kind in ("last_train", "last_test", "min_test"))]
    for name, row, parameters in (
            ("capnet_dynamic", "(a)", 9913600), ("capnet_EM", "(b)", 9991540),
            ("resnet_shape", "(c)", 1575690), ("resnet_param", "(d)", 9624782),
            ("encapnet_master", "(e)", 1689856), ("encapnet_m^2", "(f)", 8124224)):
        count, megabits, *_, paper, _ = logs[f"paper/{name}"]
        assert count == f"{parameters:,}" and float(megabits) == round(parameters / 65536, 2)
        assert paper.startswith(f"Table 1 {row}: ")
    assert logs["cap_102_OT_v2_loss_fac20"][2:7] == [
        "600", "0.01", "14.12", "13.61", "Table 3 (d1): 4.71 %"]
    for *_, paper, _ in logs.values():                                 # no figure mistyped
        if paper != "–":
            table, row, figures_ = re.fullmatch(r"Table (\d) (\(\w+\)): (.*)", paper).groups()
            theirs, = (p for part in TABLES[table] for name, _, p in part.rows
                       if name.startswith(f"{row} "))
            expected = [theirs["cost"][0], theirs["cifar10"]] if table == "1" else \
                [theirs["EncapNet"]]
            assert [float(x) for x in re.findall(r"[\d.]+", figures_)] == expected


def test_the_flags_of_a_run_reach_its_bench(cli, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "bench_step", asked.append)
    assert cli("--bench --model capnet-em --set types=2 --batch-size 2 --dataset mnist").code == 0
    assert asked == [make_config(dataset="mnist", model="capnet-em", set={"types": 2},
                                 batch_size=2)]


SMALL = "--set types=4 --schedule one-cycle --lr 3e-3 --batch-size 64 --clip 1 --epochs "
SMALL_TABLES = {"1": SMALL + "3 --dataset mnist",
                "3": SMALL + "5 --dataset folder --data-path data/cifar10-jpeg --image-size 16 "
                "--train-images 20000 --augment + --flip", "routing": "", "augment": ""}
CLAIMS = """\
1 mnist (f), mnist (c)
1 mnist (f), mnist (d)
1 mnist (f), mnist (a)
1 mnist (f), mnist (e)
3 EncapNet (4), EncapNet (1)
3 EncapNet (7), EncapNet both
3 EncapNet (7), EncapNet (4)
3 EncapNet (7), ResNet (a)
3 EncapNet (c), EncapNet (a)
3 ResNet (c), ResNet (a)
3 EncapNet (c), EncapNet (d3)"""          # table, column, first word of a row, against which other
PROSE = """\
3 EncapNet (2), EncapNet (1)
3 EncapNet (3), EncapNet (1)
3 EncapNet (4), EncapNet (1)
3 EncapNet 7, EncapNet (7)
3 EncapNet (a), EncapNet (b)
3 EncapNet (a), EncapNet (8)
3 EncapNet (c), EncapNet (d3)
augment ResNet +, ResNet no
augment ResNet ++, ResNet no
augment ResNet no, EncapNet no
augment ResNet +, EncapNet +
routing CapNet over, dynamic 3
routing CapNet random, dynamic 3"""       # the first is seen to be better


def compared(claims):
    """Errors of the two rows of each claim, and Welch's interval of their difference."""
    runs, errors = read_results(own=False)[0], {}
    for table, words in SMALL_TABLES.items():
        for part in TABLES[table]:
            for (row, column), config in part_cells(part, train.parse(words.split())[1]).items():
                word = row.removeprefix("aide kernel ").split()[0]
                errors[f"{table} {column} {word}"] = [
                    line["error"] for (key, _), line in runs.items() if key == config_key(config)]
    for claim in claims.splitlines():
        one, other = claim.split(", ")
        first, second = errors[one], errors[f"{one.split()[0]} {other}"]
        yield first, second, *scipy.stats.ttest_ind(
            first, second, equal_var=False).confidence_interval()


def test_the_readmes_claims_are_those_of_the_published_results():
    """Means, deviations, numbers of seeds and Welch's interval, of the rows that each line names.

    The verdict's interval is of the gain where it excludes 0, else of the difference.
    """
    page = (Path(train.__file__).parent / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in
            page.split("| verdict |\n")[1].split("\n\n")[0].splitlines()[1:]]
    for cells, (first, second, low, high) in zip(rows, compared(CLAIMS), strict=True):
        told = [f"{statistics.mean(e):.2f} ± {statistics.stdev(e):.2f}" for e in (first, second)]
        assert cells[-4:-1] == [*told, f"{len(first)}, {len(second)}"], cells
        digits = 2 if max(abs(low), abs(high)) < 1 else 1
        assert cells[-1] == (f"**seen**, by {-high:.{digits}f} to {-low:.{digits}f}" if high < 0
                             else f"open, {low:+.{digits}f} to {high:+.{digits}f}"), cells


def test_the_intervals_that_results_tells_are_those_of_its_tables():
    page = " ".join((Path(train.__file__).parent / "results/README.md").read_text().split())
    for claim, (_, _, low, high) in zip(PROSE.splitlines(), compared(PROSE), strict=True):
        assert high < 0 and re.search(rf"\b{-high:.1f} to {-low:.1f}\b", page), claim


def test_the_readme_agrees_with_the_published_results(monkeypatch, capsys):
    monkeypatch.chdir(Path(train.__file__).parent)
    assert train.main(["--report", "--check"]) == 0, capsys.readouterr().err


# ---- Studies of ours -----------------------------------------------------------------------------

def test_rows_of_the_study_of_routing_build_what_they_are_called():
    iterations, over_j, starts = TABLES["routing"]
    assert [len(cells_of(part)) for part in (iterations, over_j, starts)] == [4 * 2, 1, 3]
    for row, column, config in cells_of(iterations):
        net = make_model(config, 10, 1)
        assert [layer.iterations for layer in net.routed] == 2 * [int(row)]
        assert net.routed[0].routing == ("em" if column.startswith("EM") else "dynamic")
    for row, _, config in cells_of(starts):
        b = make_model(config, 10, 1).routed[0].b
        kind = "zero" if b is None else "learnable" if b.requires_grad else "random"
        assert kind == row
    assert [make_model(config, 10, 1).routed[1].softmax for *_, config in cells_of(over_j)] \
        == ["out"]
    for *_, config in (*cells_of(iterations), *cells_of(over_j), *cells_of(starts)):
        assert make_model(config, 10, 1).types == 4
        assert (config.dataset, config.image_size, config.train_images, config.epochs) == (
            "mnist", 16, 6000, 2)


def test_the_small_studies_of_tables_4_and_5_build_what_they_are_called():
    """And Table 3's setting is that of the first, but for augmentation and mirror images."""
    comparison, losses, sgd = map(cells_of, (*TABLES["augment"], *TABLES["losses"]))
    augments = {"no augmentation": ("none", False, 5), "+": ("+", False, 5), "++": ("++", True, 8)}
    setting = dict(data_path="data/cifar10-jpeg", image_size=16, train_images=20000,
                   test_images=0, batch_size=64, schedule="one-cycle", lr=3e-3, clip=1.0, lam=10.0)
    assert {cell[:2] for cell in comparison} == {
        (row, model) for row in augments for model in ("EncapNet", "ResNet")}
    for row, column, config in comparison:
        assert (config.augment, config.flip, config.epochs) == augments[row]
        assert {name: getattr(config, name) for name in setting} == setting
        net = make_model(config, 10, 3)
        if column == "ResNet":
            assert type(net) is encapnet.ResNet and net.stem[0].out_channels == 4
        else:
            assert ablations_of(config) == USUAL | dict(units=2) and net.types == 4
    kinds = {"spread, fix m": "spread-fixed", "spread": "spread", "margin": "margin",
             "CE loss": "ce"}
    rates = {"rmsprop": 0.003, "sgd": SGD_RATE, "adam": 0.003}
    assert len(losses) == 12
    for row, column, config in losses:
        assert (config.loss, config.optimizer, config.lr) == (
            kinds[row], column.lower(), rates[column.lower()])
        assert (config.model, config.dataset, config.image_size) == ("capnet-dynamic", "mnist", 16)
    margin, = (config for row, column, config in losses if (row, column) == ("margin", "SGD"))
    rows = {row: config for row, _, config in sgd}
    assert rows["SGD, rate 1"] == dataclasses.replace(margin, hold_out=True, test_images=0)
    assert [config.lr for config in rows.values()] == [0.3, 1, 3, 10]


@pytest.mark.parametrize("words, blocks", [
    ({}, 3), ({"dataset": "digits"}, 1), ({"dataset": "imagenet", "data_path": "here"}, 2)])
def test_imagenets_blocks_of_table_4_keep_to_their_own_data(words, blocks):
    assert len(asked_parts(TABLES["4"], words)) == blocks


def test_the_study_of_lambda_sees_no_test_image():
    rows = [(row, config.lam, config.clip, config.hold_out, config.model)
            for row, _, config in cells_of(TABLES["lambda"][0])]
    assert rows == [*((f"lambda {lam:g}", lam, 1, True, "encapnet-small")
                      for lam in (0, .1, 1, 10)),
                    ("lambda 10, not clipped", 10, 0, True, "encapnet-small")]


def test_no_two_series_of_a_plot_look_alike():
    _, ((axis,),) = figures.canvas(1, 1)
    figures.draw_series(axis, {str(k): {1: [2.0]} for k in range(20)})
    looks = {(line[0].get_marker(), line[0].get_color()) for line in axis.containers}
    assert len(looks) == 20


@pytest.mark.parametrize("values, middle, half", [
    ([3.0, 5.0], 4, 12.706 * 2 ** 0.5 / 2 ** 0.5),
    ([1.0, 2.0, 6.0], 3, 4.303 * 7 ** 0.5 / 3 ** 0.5),
    ([1.0, 2.0, 3.0, 4.0, 5.0], 3, 2.776 * 2.5 ** 0.5 / 5 ** 0.5)])
def test_an_interval_is_student_s(values, middle, half):
    """t with one, two and four degrees of freedom, from a table, times sd / sqrt(n)."""
    assert figures.interval(values) == pytest.approx((middle, half), rel=3e-4)
