"""Tables and figures: every row builds what it is called, in miniature they all run."""
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import encapnet
import train
from conftest import assert_one_line
from lab import bench, figures, fit, tables
from lab.config import config_key, cost_key, flags, identity_fields, make_config
from lab.fit import make_model, record
from lab.runtime import Diverged
from lab.tables import (
    CIFAR10,
    TABLES,
    measure_costs,
    part_cells,
    read_lines,
    render_costs,
    render_part,
    row_config,
    use,
)

# ------------------------------------------------------------------------------------------------
# Tables, figures, report, bench in miniature
# ------------------------------------------------------------------------------------------------

MINIATURE = "--dataset folder --epochs 1 --train-images 8 --test-images 6 --batch-size 4"


@pytest.fixture
def quick(monkeypatch):
    """No picture of each run; no second in which to time; Table 1's processes are this one."""
    monkeypatch.setattr(fit, "draw_run", lambda *run: None)
    monkeypatch.setattr(bench, "bench_step", functools.partial(bench.bench_step, seconds=0))
    true = subprocess.run

    def started(command, *arguments, **keywords):
        if "--bench" not in command:
            return true(command, *arguments, **keywords)
        return subprocess.CompletedProcess(command, train.main(command[2:]))
    monkeypatch.setattr(subprocess, "run", started)


def numbers(text, row):
    """The cells of a Markdown row."""
    return [c.strip() for line in text.splitlines() if line.startswith(f"| {row}")
            for c in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize("number, words, ran, dashed", [
    (3, "--set types=4 --row baseline KL", "(b) KL loss", "(8) two OTs"),
    (4, "--set types=2 --row ++", "EncapNet++", "EncapNet+ "),
    (5, "--set types=2 --row learnable 4 spread", "learnable", "CE loss"),
])
def test_a_table_runs_and_stands_beside_the_papers(number, words, ran, dashed, cli, quick):
    table = f"--table {number} {MINIATURE} {words}"
    done = cli(table)
    assert done.code == 0, done
    text = done.out[done.out.index("**Table"):]
    cells = numbers(text, ran)
    assert re.fullmatch(r"\d+\.\d\d", cells[0]) and re.search(r"\d|fail", cells[1]), cells
    assert "1 seed, 1 epochs, CPU" in cells[-1] and numbers(text, dashed)[1] == "–"
    assert cells[2] == "–"                                             # digits, not the paper's
    again = cli(table)
    assert again.code == 0 and "---" not in again.out.split("**Table")[0]     # nothing run twice
    assert again.out[again.out.index("**Table"):] == text
    assert Path(f"runs/table-{number}.md").read_text().strip() == text.strip()
    if number == 4:
        assert "quoted" in numbers(text, "DSN")[-1]


USUAL = dict(coefficients="both", skips="I II", aide=3, squashed=False, units=0, divergence="ot",
             bias_fix=True, plan_grad=False, extractor=True, generator="capsule", cost="cosine",
             lam=10.0)
BARE, UNIT = dict(skips=""), dict(units=1)
TABLE_3 = {    # what tells a row from EncapNet with both skips and no unit
    "(1)": dict(BARE, coefficients=None, aide=None), "(2)": dict(BARE, coefficients="own"),
    "(3)": dict(BARE, coefficients="cross"), "(4)": BARE, "(5)": dict(skips="I"),
    "(6)": dict(skips="II"), "(7)": {}, "(8)": dict(units=2), "(a)": {},
    "(b)": dict(UNIT, divergence="kl"), "(c)": UNIT, "(d1)": dict(UNIT, bias_fix=False),
    "(d2)": dict(UNIT, plan_grad=True), "(d3)": dict(UNIT, extractor=False),
    "(d4)": dict(UNIT, generator="vanilla"), "(d5)": dict(UNIT, cost="l2"),
    "aide kernel 1": dict(aide=1), "aide kernel 5": dict(aide=5), "aide kernel 7": dict(aide=7),
    "squash in each branch": dict(squashed=True), "OT loss, lambda 0.1": dict(UNIT, lam=0.1),
    "OT loss, lambda 1": dict(UNIT, lam=1.0), "OT loss, lambda 10": dict(UNIT, lam=10.0)}


def ablations_of(config):
    """What is built, in the words of USUAL."""
    net = make_model(config, 10, 3)
    module, layers = net.blocks[0], [m for m in net.modules() if isinstance(m, encapnet.CapConv)]
    found = {(m.coefficients, m.coefficients and m.aide.weight.shape[-1],
              m.branch_norms is not None) for m in layers}
    (coefficients, aide, squashed), = found                            # every layer is alike
    skips = " ".join(["I"] * (module.reduce.skip is not None) + ["II"] * module.skip)
    built = dict(coefficients=coefficients, aide=aide, squashed=squashed, skips=skips,
                 units=len(net.units) // len(net.blocks), lam=config.lam)
    for unit in net.units:
        built |= dict(divergence=unit.kind, bias_fix=unit.bias_fix, cost=unit.cost,
                      plan_grad=unit.sinkhorn["plan_grad"], extractor=unit.extractor is not None,
                      generator="capsule" if unit.types else "vanilla")
    return built


def test_rows_of_table_3_build_what_they_are_called():
    small = {"set": dict(types=2, depths=(2, 1), dims=(1, 2, 2))}
    cells = [cell for part in TABLES[3] for cell in part_cells(part, small)
             if cell[1] == "EncapNet"]
    assert len(cells) == len(TABLE_3)
    for row, _, config in cells:
        changed, = (changes for name, changes in TABLE_3.items()
                    if row == name or row.startswith(f"{name} "))
        assert ablations_of(config).items() <= (USUAL | changed).items(), row


def test_rows_of_tables_1_and_5_are_what_they_are_called():
    part, = TABLES[1]
    models = [(row[:3], config.model, config.dataset)
              for row, _, config in part_cells(part, {})]
    names = ["capnet-dynamic", "capnet-em", "cnn-same", "cnn-similar", "encapnet6-master",
             "encapnet6"]
    assert sorted(models) == sorted((f"({letter})", name, data) for letter, name in
                                    zip("abcdef", names, strict=True)
                                    for data in ("cifar10", "mnist"))
    iterations, starts, losses = (list(part_cells(part, {})) for part in TABLES[5])
    assert all(make_model(config, 10, 3).routed[0].iterations == int(row)
               for row, _, config in iterations) and len(iterations) == 4
    assert [config.set["b_init"] for _, _, config in starts] == [row for row, *_ in starts]
    called = {"spread, fix m": "spread-fixed", "spread": "spread", "margin": "margin",
              "CE loss": "ce"}
    assert all((called[row], column.lower()) == (config.loss, config.optimizer)
               for row, column, config in losses) and len(losses) == 12


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_a_whole_table_in_miniature(number, cli, quick):
    done = cli(f"--table {number} {MINIATURE} --set types=4")
    assert done.code == 0, done
    for block in done.out[done.out.index("**Table"):].split("**Table")[2 if number == 1 else 1:]:
        for line in block.splitlines():
            if line.startswith("| ") and "---" not in line and "paper" not in line:
                assert "seed" in line or "quoted" in line, line


def test_table_1_measures_cost(cli, quick):
    words = MINIATURE.replace("--epochs 1", "--epochs 10 --lr 3e-3 --train-images 30")
    text = cli(f"--table 1 {words} --set types=2 --row '(c)' --seeds 2").out
    cost = numbers(text, "(c) vanilla CNN, same shape")
    assert cost[0] == "128" and float(cost[2]) < 24.44 and "CPU" in cost[8], cost
    assert "±" in text and "2 seeds" in text
    lines = map(json.loads, Path("runs/results.jsonl").read_text().splitlines())
    benches = [line["bench"] for line in lines if "bench" in line]
    assert [b["batch"] for b in benches] == [128]


def test_costs_of_another_device_are_measured_again(cli, quick, monkeypatch):
    config = row_config(CIFAR10, use("cnn-same", width=1 / 16))
    line = {**cost_key(config), "batch": 128, "device": "H100"}
    Path("runs").mkdir(exist_ok=True)
    Path("runs/results.jsonl").write_text(json.dumps({"bench": line}) + "\n")
    measure_costs({"set": {"types": 2}, "device": "cpu"}, ["(c)"])
    measure_costs({"set": {"types": 2}, "device": "cpu"}, ["(c)"])
    lines = list(read_lines(Path("runs/results.jsonl")))
    assert [entry["bench"]["device"][:3] for entry in lines] == ["H10", "CPU"]


def test_table_2_is_the_built_network(cli):
    done = cli("--table 2")
    assert done.code == 0 and done.out.count("as the paper's") == 2
    assert "| stem" in done.out and "512 x 4 x 4" in done.out


def test_failing_rows_are_reported_and_the_others_go_on(cli, quick):
    words = f"--table 3 {MINIATURE} --set width=broad --set types=2 --row '(b) KL'"
    done = cli(words)
    assert_one_line(done, "1 runs failed", "ResNet", "width", code=1)
    cells = numbers(done.out, "(b) KL loss")
    assert "1 seed" in cells[-1] and cells[4] == "–"


def test_a_tables_set_reaches_the_networks_that_have_it():
    given = dict(set={"types": 8, "depths": (1,), "blocks": (1, 2), "tipes": 3})
    narrow = {name: row_config(dict(model=name), given).set
              for name in ("encapnet", "resnet18", "cnn-similar")}
    assert narrow == {"encapnet": {"types": 8, "depths": (1,), "tipes": 3},
                      "resnet18": {"width": 0.25, "blocks": (1, 2), "tipes": 3},
                      "cnn-similar": {"width": 2.375 / 4, "tipes": 3}}


@pytest.mark.parametrize("number", [2, 4])
def test_figures(number, cli, quick, monkeypatch):
    drawn_ones, draw = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn_ones.append(figure) or
                        draw(figure, path))
    done = cli(f"--figure {number} {MINIATURE} --set types=4 --output-dir drawn")
    assert done.code == 0, done
    with Image.open(f"drawn/figure-{number}.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors()) > 10
    lines = [list(line.get_ydata()) for axis in drawn_ones[-1].axes for line in axis.lines]
    runs = list(map(json.loads, Path("runs/results.jsonl").read_text().splitlines()))
    if number == 4:
        recorded = sorted(r["curves"]["loss"] for r in runs)
        assert len(lines) == 4 and sorted(lines) == [pytest.approx(line) for line in recorded]
        return
    moments = [m for r in runs for m in r["moments"]]
    assert [m["epoch"] for m in moments] == [0, 1] * 2
    assert all(sum(m["percent"]) == pytest.approx(100) for m in moments)
    drawn = [[length for length in line if length == length] for line in lines]     # but the nan
    assert drawn == [[length for length, percent in zip(m["length"], m["percent"], strict=True)
                      if percent] for m in moments]


def test_a_figure_without_runs_says_why(cli, quick, monkeypatch):
    def diverge(config):
        raise Diverged("NaN at step 1; stopped")
    monkeypatch.setattr(tables, "fit", diverge)
    assert_one_line(cli(f"--figure 4 {MINIATURE}"), "nothing to draw", "NaN at step 1", code=1)


def test_every_column_tells_its_own_seeds_and_devices():
    result = dict(error=10.0, epochs=600, outcome="ok")
    runs = {}
    for (*_, config), devices in zip(list(part_cells(TABLES[1][0], {}))[:2],
                                     (["H100"] * 2, ["CPU"]), strict=True):
        for seed, device in enumerate(devices):
            runs[config_key(config), seed] = {**result, "environment": {"device": device}}
    text = render_part(1, TABLES[1][0], {}, runs)
    assert "| 14.28 | 10.00 ± 0.00 | -4.28 | 0.37 | 10.00 | +9.63 |" in text
    assert "| CIFAR-10: 2 seeds, 600 epochs, H100; MNIST: 1 seed, 600 epochs, CPU |" in text


def test_costs_are_of_the_same_settings_and_device():
    config = row_config(CIFAR10, use("cnn-same"))
    line = {**cost_key(config), "batch": 128, "parameters": 10 ** 6, "memory_MB": 100.,
            "step_seconds": 1., "device": "H100"}
    others = [{**line, "amp": True, "memory_MB": 1.}, {**line, "image_size": 64, "memory_MB": 2.},
              {**line, "batch": 4096, "device": "CPU", "memory_MB": 777.}]
    text = render_costs(TABLES[1][0], {}, [line, *others])
    cells = numbers(text, "(c) vanilla CNN, same shape")
    assert cells[4:6] == ["100", "100 (128)"] and cells[-1] == "H100"


def test_flags_are_read_back():
    config = make_config(dataset="mnist", model="encapnet6", set={"types": 4}, lr=3e-3,
                               milestones=(1, 2), channels_last=True, amp=False)
    fields = {**identity_fields(config), "amp": False, "channels_last": True}
    fields.pop("class_list")                                           # empty: not to be given
    commands, given = train.parse(flags(fields))
    assert not commands and make_config(**given) == config


def test_a_torn_line_costs_no_other(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    results = Path("runs/results.jsonl")
    record({"n": 1})
    results.write_text(results.read_text() + '{"n": 2, "to')
    record({"n": 3})
    assert list(read_lines(results)) == [{"n": 1}, {"n": 3}]
    assert "line 2: torn" in capsys.readouterr().out


@pytest.mark.parametrize("words, told", [
    ("--check", "--check"), ("--row x", "--row"), ("--seeds 3", "--seeds"),
    ("--table 3 --figure 4", "one at a time"), ("--figure 2 --seeds 2", "--seeds"),
    ("--bench network --model encapnet6 --amp", "--amp, --model"), ("--list --seeds 2", "--seeds")])
def test_flags_without_effect_are_refused(words, told, cli):
    assert_one_line(cli(words), told)


def test_report_renders_and_checks(cli, quick):
    assert cli(f"--table 5 {MINIATURE} --set types=2 --row 4").code == 0
    words = f"5 {MINIATURE} --set types=2"
    Path("README.md").write_text(f"before\n<!-- table {words} -->\nstale\n<!-- end -->\nafter\n"
                                 "<!-- runs -->\n<!-- end -->\n<!-- speed -->\n<!-- end -->\n")
    assert_one_line(cli("--report --check"), "does not agree", code=1)
    bench.compare("squash", (0.002, None), {"loops": (0.005, 3e6)}, torch.device("cpu"))
    bench.compare("squash", (0.002, 2e6), {"loops": (0.006, 3e6)}, torch.device("cpu"))
    Path("results").mkdir()
    shutil.copy("runs/results.jsonl", "results/all.jsonl")
    assert cli("--report").code == 0 and cli("--report --check").code == 0
    text = Path("README.md").read_text()
    assert text.startswith("before") and "after" in text and "stale" not in text
    assert "1 seed" in numbers(text, "4")[-1] and f"--table {words}" in text
    assert numbers(text, "squash") == [*"loops 2.0 6.0 3.00 2 3 1.50".split(), "CPU, 1 thread"]
    Path("README.md").write_text(text.replace("14.25", "14.26"))
    assert_one_line(cli("--report --check"), "does not agree", code=1)


def test_bench(cli, quick):
    done = cli("--bench --model capnet-em --set types=2 --batch-size 2")
    assert done.code == 0
    for part in ("images/s", "forward", "backward", "optimizer", "data", "peak memory"):
        assert part in done.out
    line = json.loads(Path("runs/results.jsonl").read_text())["bench"]
    parts = [line[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer")]
    assert min(parts) > 0 and sum(parts) < 10 * line["train_step_seconds"] < 100 * sum(parts)


def test_the_readme_agrees_with_the_published_results(monkeypatch, capsys):
    monkeypatch.chdir(Path(train.__file__).parent)
    assert train.main(["--report", "--check"]) == 0, capsys.readouterr().err
