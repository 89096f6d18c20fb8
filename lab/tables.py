"""The paper's tables and figures: rows as data, the runner, rendering beside its numbers."""
import dataclasses
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import encapnet
from lab.config import (
    config_key,
    cost_key,
    data_name,
    flags,
    has_logits,
    make_config,
    merge,
)
from lab.figures import draw_few, draw_figure2, draw_figure4, draw_routing
from lab.fit import clock, environment, fit, make_model, record
from lab.runtime import (
    PUBLISHED,
    README,
    RUNS,
    Diverged,
    Problem,
    pick_device,
    rank,
    reason,
    say,
    write_file,
)

# ------------------------------------------------------------------------------------------------
# The paper's tables as data: rows are changes to Config
# ------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A table or a block of it: base, columns and rows are changes to Config, a cell all three."""

    title: str
    base: dict
    columns: dict          # name: changes
    rows: list             # (name, changes, {column: the paper's error in %});  None: quoted there
    own_data: bool = False           # stays on its data set when --dataset asks for another
    study: bool = False              # ours, not the paper's: every cell is run, nothing beside it


def use(name, **keywords):
    return dict(model=name, set=keywords)


CIFAR10, MNIST = dict(dataset="cifar10"), dict(dataset="mnist")
SETS = ("cifar10", "cifar100", "svhn")
DEEP = dict(feedback=0, coefficients="both", skip="both")    # Table 3's EncapNet without a unit
TABLES = {
    1: [Part("six-layer networks", {}, {"CIFAR-10": CIFAR10, "MNIST": MNIST}, [
        # "cost": the paper's Mb of parameters, MB of memory at this batch, s a batch on a Titan X
        ("(a) CapNet, dynamic", use("capnet-dynamic"),
         {"CIFAR-10": 14.28, "MNIST": 0.37, "cost": (151.24, 3961, 8, 0.444)}),
        ("(b) CapNet, EM", use("capnet-em"),
         {"CIFAR-10": 12.66, "MNIST": 0.31, "cost": (152.44, 10078, 4, 0.957)}),
        ("(c) vanilla CNN, same shape", use("cnn-same"),
         {"CIFAR-10": 14.43, "MNIST": 0.38, "cost": (24.44, 1652, 128, 0.026)}),
        ("(d) vanilla CNN, similar param", use("cnn-similar"),
         {"CIFAR-10": 12.09, "MNIST": 0.33, "cost": (146.88, 2420, 128, 0.146)}),
        ("(e) EncapNet, master", use("encapnet6-master"),
         {"CIFAR-10": 13.87, "MNIST": 0.31, "cost": (25.76, 1433, 128, 0.039)}),
        ("(f) EncapNet, master/aide", use("encapnet6"),
         {"CIFAR-10": 11.93, "MNIST": 0.25, "cost": (60.68, 1755, 128, 0.061)}),
    ])],
    3: [Part("capConv design", CIFAR10, {"EncapNet": use("encapnet")}, [
        ("(1) master (baseline)", dict(set=dict(DEEP, coefficients=None, skip=None)),
         {"EncapNet": 9.83}),
        ("(2) master/aide v1", dict(set=dict(DEEP, coefficients="own", skip=None)),
         {"EncapNet": 8.05}),
        ("(3) master/aide v2", dict(set=dict(DEEP, coefficients="cross", skip=None)),
         {"EncapNet": 9.11}),
        ("(4) master/aide v3", dict(set=dict(DEEP, skip=None)), {"EncapNet": 7.41}),
        ("(5) skip on Type I", dict(set=dict(DEEP, skip="I")), {"EncapNet": 6.81}),
        ("(6) skip on Type II", dict(set=dict(DEEP, skip="II")), {"EncapNet": 6.75}),
        ("(7) skip both", dict(set=DEEP), {"EncapNet": 5.82}),
        ("(8) two OTs", dict(set=dict(DEEP, feedback=2)), {"EncapNet": 4.55}),
    ]), Part("regularization", CIFAR10,
             {"EncapNet": use("encapnet", **DEEP), "ResNet": use("resnet18")}, [
        ("(a) capConv block (baseline)", dict(set=dict(feedback=0)),
         {"EncapNet": 5.82, "ResNet": 8.03}),
        ("(b) KL loss", dict(set=dict(feedback=1, divergence="kl")),
         {"EncapNet": 5.31, "ResNet": 7.72}),
        ("(c) OT loss", dict(set=dict(feedback=1)), {"EncapNet": 4.58, "ResNet": 7.67}),
        ("(d1) remove bias fix", dict(set=dict(feedback=1, bias_fix=False)), {"EncapNet": 4.71}),
        ("(d2) do BP in P_L", dict(set=dict(feedback=1, plan_grad=True)), {"EncapNet": 4.77}),
        ("(d3) no extractor", dict(set=dict(feedback=1, extractor=False)), {"EncapNet": 5.79}),
        ("(d4) use vanilla g", dict(set=dict(feedback=1, generator="vanilla")), {"EncapNet": 5.01}),
        ("(d5) use l2 in Q", dict(set=dict(feedback=1, cost="l2")), {"EncapNet": 4.90}),
    ]), Part("what the paper leaves open, beside (7) and (c); not in the paper", CIFAR10,
             {"EncapNet": use("encapnet", **DEEP)}, [
        *((f"aide kernel {k}", dict(set=dict(aide_kernel=k)), {"EncapNet": "–"})
          for k in (1, 5, 7)),
        ("squash in each branch", dict(set=dict(squash_branches=True)), {"EncapNet": "–"}),
        *((f"OT loss, lambda {lam:g}", dict(lam=lam, set=dict(feedback=1)), {"EncapNet": "–"})
          for lam in (0.1, 1.0, 10.0)),
    ])],
    4: [Part("comparison; the paper's mean ± std: ++ on CIFAR-10 3.56 ± 0.12 and SVHN 1.87 ± 0.11, "
             "+ on "
             "CIFAR-100 24.85 ± 0.11", use("encapnet"),
             {name: dict(dataset=name) for name in SETS},
             [(f"EncapNet{a}", dict(augment=a or "none"), dict(zip(SETS, p, strict=True)))
              for a, *p in (("", 4.55, 26.77, 2.01), ("+", 3.13, 24.01, 1.64),
                            ("++", 3.10, 24.18, 1.52))]
             + [(name, None, dict(zip(SETS, p, strict=True))) for name, *p in (
                 ("GoodInit", 5.84, 27.66, None), ("BayesNet", 6.37, 27.40, None),
                 ("ResNet", 6.43, None, None),
                 ("ELU", 6.55, 24.28, None), ("Batch NIN", 6.75, 28.86, 1.81),
                 ("Rec-CNN", 7.09, 31.75, 1.77),
                 ("Piecewise", 7.51, 30.83, None), ("DSN", 8.22, 34.57, 1.92),
                 ("NIN", 8.80, 35.68, 2.35),
                 ("dasNet", 9.22, 33.78, None), ("Maxout", 9.35, 38.57, 2.47),
                 ("AlexNet", 11.00, None, None))]),
        Part("h-ImageNet, top-1", dict(dataset="h-imagenet"), {"h-ImageNet": {}}, [
            (name, dict(model=model, image_size=side, augment=augment), {"h-ImageNet": error})
            for name, model, side, augment, error in (
                ("EncapNet v1", "encapnet", 128, "none", 48.23),
                ("EncapNet v2", "encapnet-v2", 128, "none", 43.15),
                ("EncapNet v3", "encapnet-v3", 224, "none", 42.76),
                ("EncapNet v3+", "encapnet-v3", 224, "+", 40.18),
                ("EncapNet v3++", "encapnet-v3", 224, "++", 40.05),
                ("WRN", "wide_resnet101_2", 224, "++", 42.51),
                ("ResNet-101", "resnet101", 224, "++", 44.13), ("VGG", "vgg16", 224, "++", 55.76),
                ("GoogleNet", "googlenet", 224, "++", 60.18))], own_data=True),
        Part("complete ImageNet, top-5", dict(dataset="imagenet", augment="++"), {"ImageNet": {}}, [
            (name, use(model), {"ImageNet": error}) for name, model, error in (
                ("EncapNet-18", "encapnet", 7.51), ("GoogleNet", "googlenet", 7.89),
                ("VGG", "vgg16", 8.43), ("ResNet-101", "resnet101", 6.21))],
            own_data=True)],
    5: [Part("routing iterations, CapNet (dynamic)", CIFAR10, {"CIFAR-10": use("capnet-dynamic")}, [
        (str(r), dict(set=dict(iterations=r)), {"CIFAR-10": error})
        for r, error in ((1, 14.79), (2, 14.41), (3, 14.28), (4, 14.25))]),
        Part("initial routing coefficients", CIFAR10, {"CIFAR-10": use("capnet-dynamic")}, [
            (b, dict(set=dict(b_init=b)), {"CIFAR-10": error})
            for b, error in (("random", 14.35), ("zero", 14.28), ("learnable", 14.11))]),
        Part("loss and optimizer", dict(CIFAR10, **use("capnet-dynamic")),
             {"RMSProp": dict(optimizer="rmsprop"), "SGD": dict(optimizer="sgd"),
              "Adam": dict(optimizer="adam")}, [
            (name, dict(loss=loss), dict(RMSProp=rmsprop, SGD=sgd, Adam=adam))
            for name, loss, rmsprop, sgd, adam in (
                ("spread, fix m", "spread-fixed", 15.61, 15.38, 14.97),
                ("spread", "spread", 15.02, 14.87, 14.50),
                ("margin", "margin", 14.30, 15.18, 14.28),
                ("CE loss", "ce", 14.76, "fail", 15.31))])],
}

# Studies: tables of ours, run, resumed and rendered like the paper's
FEW = dict(dataset="mnist", image_size=16, resample=True, test_images=2000, batch_size=50,
           schedule="one-cycle", lr=3e-3, clip=1.0, lam=0.0,
           **use("encapnet", types=4, depths=(1, 1, 1), dims=(2, 4, 8, 16), feedback=1))
FEW_SIZES = {"200": dict(train_images=200, epochs=60), "500": dict(train_images=500, epochs=30),
             "1000": dict(train_images=1000, epochs=20), "2000": dict(train_images=2000, epochs=10)}
ROUTING = dict(dataset="mnist", train_images=6000, test_images=2000, batch_size=64,
               schedule="one-cycle", lr=3e-3, set=dict(types=4))
ROUTINGS = {f"{name}{', fifth convolution' * fifth}": use(model, fifth_conv=fifth)
            for name, model in (("dynamic", "capnet-dynamic"), ("EM", "capnet-em"))
            for fifth in (False, True)}


def study(title, base, columns, rows):
    """A part without the paper's numbers.   rows: {name: changes}"""
    return Part(title, base, columns, [(*row, {}) for row in rows.items()], study=True)


TABLES |= {
    "lambda": [study(
        "feedback weight of the default run, error on every tenth training image",
        dict(dataset="digits", model="encapnet-small", hold_out=True), {"error": {}},
        {f"lambda {lam:g}": dict(lam=lam) for lam in (0.0, 0.1, 1.0, 10.0)})],
    "few": [study(
        "the feedback unit where images are few: MNIST at 16x16, a column a number of training "
        "images, drawn anew for every seed", FEW, FEW_SIZES,
        {"no feedback": {}, **{f"OT, lambda {lam:g}": dict(lam=lam) for lam in (1.0, 10.0, 30.0)},
         "KL, lambda 10": dict(lam=10.0, set=dict(divergence="kl")),
         "weight decay 5e-3": dict(weight_decay=5e-3), "shifts (+)": dict(augment="+")}), study(
        "which part of the unit: 500 images, lambda 10", dict(FEW, lam=10.0),
        {"500": FEW_SIZES["500"]},
        {"no bias fix (d1)": dict(set=dict(bias_fix=False)),
         "gradient of the plan (d2)": dict(set=dict(plan_grad=True)),
         "raw pixels (d3)": dict(set=dict(extractor=False)),
         "vanilla generator (d4)": dict(set=dict(generator="vanilla")),
         "l2 cost (d5)": dict(set=dict(cost="l2")), "two units": dict(set=dict(feedback=2)),
         "eps 1": dict(set=dict(eps=1.0))})],
    "routing": [study(
        f"routing iterations: MNIST at {side}x{side}, 6,000 images, {epochs} epochs, 4 types",
        dict(ROUTING, image_size=side, epochs=epochs), ROUTINGS,
        {str(r): dict(set=dict(iterations=r)) for r in (1, 2, 3, 5)})
        for side, epochs in ((16, 2), (32, 4))] + [study(
        "the softmax over j, which did not converge in the paper: MNIST at 16x16, 3 iterations",
        dict(ROUTING, image_size=16, epochs=2), dict(list(ROUTINGS.items())[:2]),
        {"over j": dict(set=dict(softmax="out"))})],
}
# Channels (EncapNet: 32 types x capsule dimension) and side of the outputs of M0 .. M4 of both
TABLE2 = {"stem": (32, 32), "blocks.0": (64, 32), "blocks.1": (128, 16), "blocks.2": (256, 8),
          "blocks.3": (512, 4)}
FIGURES = {
    2: ("agreement of votes with the class capsule",
        {"Dynamic": use("capnet-dynamic"), "EM": use("capnet-em")}),
    4: ("training loss with and without OT divergence",
        {"EncapNet": use("encapnet", feedback=0), "EncapNet * OT": use("encapnet", feedback=1),
         "ResNet": use("resnet18", feedback=0), "ResNet * OT": use("resnet18", feedback=1)}),
    "few": ("what feedback gains on few images", {}),
    "routing": ("error against routing iterations", {}),
}


# ------------------------------------------------------------------------------------------------
# The runner: find what has been run, run what has not, print beside the paper's
# ------------------------------------------------------------------------------------------------


def read_lines(*files):
    """The entries of JSON-lines files; a torn line is told and left out."""
    for file in files:
        for n, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                yield entry
            elif line:
                say(f"{file}, line {n}: torn, left out")


def read_results(*files):
    """{(config key, seed): result}, later lines win, and the lines of --bench."""
    entries = list(read_lines(*files))
    return ({(e["key"], e["seed"]): e for e in entries if "key" in e},
            [e["bench"] for e in entries if "bench" in e])


def published():
    return sorted(PUBLISHED.glob("*.jsonl"))


def row_config(*layers):
    """A cell's Config.  --set reaches the networks that take it; types=T narrows the others."""
    changes = merge(*layers)
    cls, usual = encapnet.MODELS.get(changes["model"], (None, {}))
    wanted, types = changes["set"], changes["set"].get("types")
    if cls:
        mine = encapnet.keywords(cls)
        known = {name for other, _ in encapnet.MODELS.values() for name in encapnet.keywords(other)}
        wanted = {k: v for k, v in wanted.items() if k in mine or k not in known}
    if isinstance(types, int) and has_logits(changes["model"]):
        rest = {k: v for k, v in wanted.items() if k != "types"}
        wanted = {"width": usual.get("width", 1.0) * types / 32, **rest}
    return make_config(**{**changes, "set": wanted})


def part_columns(part, given):
    """The columns to run: with --dataset, that data set's, or the first on other data."""
    if "dataset" not in given or not all("dataset" in changes for changes in part.columns.values()):
        return part.columns
    same = {name: c for name, c in part.columns.items() if c["dataset"] == given["dataset"]}
    return same or dict(list(part.columns.items())[:1])


def part_cells(part, given, only=()):
    """(row, column, Config) of every cell that the paper fills by a run."""
    for name, changes, paper in part.rows:
        if changes is not None and (not only or any(word in name for word in only)):
            for column, about in part_columns(part, given).items():
                if part.study or paper.get(column) is not None:
                    yield name, column, row_config(part.base, about, changes, given)


def wanted_parts(number, given):
    """Blocks to run: with --dataset, those that can take it; ImageNet's keep to their own."""
    if "dataset" not in given:
        return TABLES[number]
    return [part for part in TABLES[number]
            if not part.own_data or part.base["dataset"] == given["dataset"]]


def obtain(name, config, runs):
    """Run a Config unless its result is known; a failure is reported, one of training recorded.

    -> None, or what went wrong
    """
    key = config_key(config)
    if (key, config.seed) in runs:
        return None
    folder = RUNS / f"{data_name(config)}-{config.model}-{key}-{config.seed}"
    finished = folder / "result.json"
    resume = str(folder) if (folder / "last.pt").exists() and not finished.exists() else None
    if finished.exists():                                 # but its line in results.jsonl was lost
        runs[key, config.seed] = json.loads((folder / "result.json").read_text())
        return None
    say(f"--- {name}, seed {config.seed}")
    try:
        config = dataclasses.replace(config, output_dir=str(folder), resume=resume)
        runs[key, config.seed] = fit(config)
        return None
    except Diverged as failure:
        line = {"data": data_name(config), "model": config.model, "key": key, "seed": config.seed,
                "error": None, "epochs": config.epochs, "outcome": str(failure).split(";")[0],
                "seconds": None, "folder": str(folder), "config": dataclasses.asdict(config),
                "environment": environment(pick_device(config.device))}
        runs[key, config.seed] = line
        if rank() == 0:
            record(line)
    except Problem as failure:
        if failure.code > 128:                            # asked to stop
            raise
        say(f"failed: {name}: {failure}")
        return f"{name}: {failure}"
    except (RuntimeError, MemoryError) as failure:        # out of memory, most likely
        say(f"failed: {name}: {reason(failure)}")
        return f"{name}: {reason(failure)}"


def obtain_all(cells, seeds, runs):
    """Run what is missing among cells [(name, Config)] -> what went wrong."""
    failures = []
    for name, config in cells:
        for seed in range(config.seed, config.seed + seeds):
            failures.append(obtain(name, dataclasses.replace(config, seed=seed), runs))
    return [f for f in failures if f]


def summary(config, paper, runs):
    """ours, difference and how, of one cell, over all seeds known -> three strings."""
    lines = [r for (key, _), r in sorted(runs.items()) if key == config_key(config)]
    if not lines:
        return "–", "–", "–"
    devices = " and ".join(sorted({r["environment"]["device"] for r in lines}))
    how = f"{len(lines)} seed{'s' * (len(lines) > 1)}, {lines[0]['epochs']} epochs, {devices}"
    bad = [r["outcome"] for r in lines if r["outcome"] != "ok"]
    if bad:
        return f"fail ({bad[0]})", "–", how
    errors = [r["top5_error" if config.dataset == "imagenet" else "error"] for r in lines]
    mean = statistics.mean(errors)
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{mean:.2f}{spread}", f"{mean - paper:+.2f}" if isinstance(paper, float) else "–", how


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def render_part(number, part, given, runs):
    """One block as Markdown: paper | ours | difference, of the same data, for each column."""
    if part.study:
        return render_study(number, part, given, runs)
    columns = part_columns(part, given)
    theirs = {(row, column): config.dataset for row, column, config in part_cells(part, {})}
    cells = {(row, column): config for row, column, config in part_cells(part, given)}
    first = next(iter(cells.values()))
    many = len(columns) > 1
    header = [""] + [f"{name} {what}".strip() if many else what for name in columns
                     for what in ("paper", "ours", "difference")] + ["ours: how"]
    rows = []
    for name, changes, paper in part.rows:
        line, told = [name], {}
        for column in columns:
            value, config = paper.get(column), cells.get((name, column))
            shown = [f"{value:.2f}" if isinstance(value, float) else value or "–", "–", "–"]
            if config:
                same = config.dataset == theirs[name, column]
                *shown[1:], told[column] = summary(config, value if same else None, runs)
            line += shown
        how = {column: how for column, how in told.items() if how != "–"}
        alike = len(set(how.values())) == 1
        rows.append([*line, "quoted" if changes is None else next(iter(how.values())) if alike else
                     "; ".join(f"{column}: {each}" for column, each in how.items()) or "–"])
    return f"**Table {number}: {part.title}.** {told_of(first, given)}\n\n" + markdown(header, rows)


def render_study(name, part, given, runs):
    """One block of ours as Markdown: mean ± std for each column, and over what."""
    columns, rows = part_columns(part, given), {}
    for row, column, config in part_cells(part, given):
        ours, _, how = summary(config, None, runs)
        rows.setdefault(row, {})[column] = (ours, how)
    lines = [[row, *(cells[column][0] for column in columns),
              "; ".join(dict.fromkeys(how for _, how in cells.values()))]
             for row, cells in rows.items()]
    return (f"**{name}: {part.title}.** Error in %{changes_told(given)}.\n\n"
            + markdown(["", *columns, "how"], lines))


def changes_told(given):
    return "".join(f", {k}={v}" for k, v in given.get("set", {}).items())


def told_of(config, given):
    """The heading's account of what was run."""
    data = data_name(config) if "dataset" in given else "the paper's data"
    images = f", {config.train_images:,} training images" if config.train_images else ""
    changes = changes_told(given)
    fast = " (recipe fast: not the paper's schedule)" if config.recipe == "fast" else ""
    return f"Test error in %; ours: {data}{images}, {config.epochs} epochs{fast}{changes}."


def costs_of(config, benches):
    """The lines of --bench with these settings, of any batch and device."""
    return [b for b in benches if all(b.get(k) == v for k, v in cost_key(config).items())]


def render_costs(part, given, benches):
    """Table 1's parameters, memory and time a batch."""
    rows = []
    for name, changes, paper in part.rows:
        megabits, memory, batch, seconds = paper["cost"]
        config = row_config(CIFAR10, changes, given)
        known = costs_of(config, benches)
        line = next((b for b in reversed(known) if b["batch"] == batch), None)
        cells = ["–"] * 4
        if line:
            biggest = max((b for b in known if b["device"] == line["device"]),
                          key=lambda b: b["batch"])
            cells = [f"{line['parameters'] * 32 / 1e6:.2f}", f"{line['memory_MB']:,.0f}",
                     f"{biggest['memory_MB']:,.0f} ({biggest['batch']})",
                     f"{line['step_seconds']:.3f}"]
        rows.append([name, batch, megabits, cells[0], f"{memory:,}", *cells[1:3], seconds, cells[3],
                     line["device"] if line else "–"])
    return (f"**Table 1: cost.** Runtime: forward and backward of a batch{changes_told(given)}.\n\n"
            ) + markdown(
        ["", "batch", "Mb of parameters: paper", "ours", "MB of memory: paper", "ours",
         "ours, largest batch run", "s a batch: paper", "ours", "device"], rows)


TRAIN = Path(__file__).parents[1] / "train.py"


def measure_costs(given, only):
    """Bench every row of Table 1 in a process of its own, whose peak memory is then its own."""
    for name, changes, paper in TABLES[1][0].rows:
        if only and not any(word in name for word in only):
            continue
        config, batch = row_config(CIFAR10, changes, given), paper["cost"][2]
        device = pick_device(config.device)
        benches = costs_of(config, read_results(*published(), RUNS / "results.jsonl")[1])
        known = [b["batch"] for b in benches if b["device"] == environment(device)["device"]]
        limit = batch if device.type == "cpu" else 4096
        while batch <= limit:
            if batch not in known:
                say(f"--- {name}: memory and time at batch {batch}")
                words = flags({**cost_key(config), "dataset": config.dataset, "batch_size": batch,
                               "device": config.device})
                if subprocess.run([sys.executable, str(TRAIN), "--bench", *words]).returncode:
                    say(f"batch {batch} did not run, and no larger one is tried")
                    break
            batch *= 2


def show_table(number, only, seeds, given):
    """Run what a table lacks, print it, keep it in runs/table-N.md -> exit code."""
    runs, _ = read_results(*published(), RUNS / "results.jsonl")
    failures = []
    if number == 1 and rank() == 0:
        measure_costs(given, only)
    for part in wanted_parts(number, given) if number != 2 else ():
        cells = [(f"{row}, {column}", config)
                 for row, column, config in part_cells(part, given, only)]
        failures += obtain_all(cells, seeds, runs)
    benches = read_results(*published(), RUNS / "results.jsonl")[1]
    text = "\n\n".join(render_table(number, given, (runs, benches)))
    say("\n" + text)
    if rank() == 0:
        RUNS.mkdir(exist_ok=True)
        write_file(RUNS / f"table-{number}.md", text.encode())
    if failures:
        raise Problem(f"{len(failures)} runs failed: {'; '.join(failures)}", 1)


def render_table(number, given, results):
    """-> [a block of Markdown, ...]"""
    if number == 2:
        return [architecture("encapnet", given), architecture("resnet18", given)]
    runs, benches = results
    texts = [render_part(number, part, given, runs) for part in wanted_parts(number, given)]
    if number == 1:
        texts.insert(0, render_costs(TABLES[1][0], given, benches))
    return texts


def watched(network, x):
    """Run x through the network -> {layer name: (output shape without batch, FLOPs)}."""
    from torch.utils.flop_counter import FlopCounterMode
    shapes = {}

    def note(name, out):
        out = out[-1] if isinstance(out, tuple) else out
        shapes[name] = tuple(out.shape[1:])

    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, given, out, name=name: note(name, out))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    flops = {k.partition(".")[2]: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    return {name: (shape, flops.get(name, 0)) for name, shape in shapes.items()}


def architecture(name, given):
    """Table 2 from the built network; a Problem where sizes are not the paper's."""
    narrow = {"set": given.get("set", {})}
    network = make_model(row_config(CIFAR10, use(name, feedback=0), narrow), 10, 3).eval()
    seen, rows = watched(network, torch.zeros(1, 3, 32, 32)), []
    for key, module in network.named_modules():
        if key in ("stem", "classes") or re.fullmatch(r"blocks\.\d\.\w+", key):
            parts = [k for k in seen if k == key or k.startswith(key + ".")]
            depth = min(k.count(".") for k in parts)      # a list has no output of its own
            parts = [k for k in parts if k.count(".") == depth]
            shape = seen[parts[-1]][0]
            image = name == "encapnet" and len(shape) == 3
            capsule = shape[0] // network.types if image else shape[-1]
            weights = sum(p.numel() for p in module.parameters())
            rows.append([key + f" x {len(parts)}" * (len(parts) > 1), " x ".join(map(str, shape)),
                         capsule if name == "encapnet" else "–", f"{weights:,}",
                         f"{sum(seen[k][1] for k in parts) / 1e6:,.2f}"])
    wrong = not given.get("set") and {
        key: seen[key][0] for key, (channels, side) in TABLE2.items()
        if seen[key][0] != (channels, side, side)}
    if wrong:
        raise Problem(f"Table 2: {name} gives {wrong}, the paper has {TABLE2}", 1)
    weights = sum(p.numel() for p in network.parameters())
    note = f"changed by {narrow['set']}" if given.get("set") else "output sizes as the paper's"
    return (f"**Table 2: {name}.** {weights:,} parameters, {seen[''][1] / 1e6:,.0f} million FLOPs "
            f"an image; {note}.\n\n"
            + markdown(["layer", "output", "capsule dim", "parameters", "MFLOPs"], rows))


def show_figure(number, seeds, given):
    """Run what a figure lacks and draw it, into --output-dir or runs/."""
    title, variants = FIGURES[number]
    target = Path(given.get("output_dir", RUNS)) / f"figure-{number}.png"
    given = {k: v for k, v in given.items() if k != "output_dir"}
    if number in ("few", "routing"):
        return show_study(number, given, target)
    configs = {name: row_config(CIFAR10, changes, given) for name, changes in variants.items()}
    runs, _ = read_results(*published(), RUNS / "results.jsonl")
    failures = obtain_all(list(configs.items()), seeds, runs)
    if failures:
        raise Problem(f"{len(failures)} runs failed: {'; '.join(failures)}", 1)
    lines = {name: [r for (key, _), r in sorted(runs.items())
                    if key == config_key(config) and "curves" in r]
             for name, config in configs.items()}
    for name, config in configs.items():
        if not lines[name]:
            raise Problem(f"{name}: nothing to draw, {summary(config, None, runs)[0]}", 1)
    if rank() == 0:
        title = f"{title}, {data_name(next(iter(configs.values())))}"
        {2: draw_figure2, 4: draw_figure4}[number](lines, title, target)


def study_errors(part, given, runs):
    """{row: {column: {seed: error}}} of what has been run."""
    found = {}
    for row, column, config in part_cells(part, given):
        errors = {seed: r["error"] for (key, seed), r in sorted(runs.items())
                  if key == config_key(config) and r["error"] is not None}
        if errors:
            found.setdefault(row, {})[column] = errors
    return found


def show_study(name, given, target):
    """Draw a study from what its table has run: nothing is trained here."""
    runs, _ = read_results(*published(), RUNS / "results.jsonl")
    parts = [study_errors(part, given, runs) for part in TABLES[name]]
    if not parts[0]:
        raise Problem(f"nothing has been run yet: python train.py --table {name} --seeds 3", 1)
    if rank() == 0:
        {"few": draw_few, "routing": draw_routing}[name](parts, target)


def report(check, parse):
    """Render the tables of README.md and results/README.md from the lines of results/.

    <!-- table 3 --epochs 20 ... --> to <!-- end -->; table 3/2 is its second block alone
    parse: words of a command line -> commands, fields of Config given
    """
    runs, benches = read_results(*published())

    def fill(match):
        kind, *words = shlex.split(match[1])
        if kind == "runs":
            text = render_runs(runs)
        elif kind == "speed":
            text = render_speed(read_lines(*published()))
        else:
            (table, _, part), (commands, given) = words[0].partition("/"), parse(words[1:])
            if commands:
                raise Problem(f"{match[1]}: only flags of a run here")
            name = int(table) if table.isdigit() else table
            blocks = render_table(name, given, (runs, benches))
            text = blocks[int(part) - 1] if part else "\n\n".join(
                [*blocks, f"`python train.py --table {shlex.join([table, *words[1:]])}`"])
        return f"<!-- {match[1]} -->\n{text}\n<!-- end -->"

    pages = [page for page in (README, PUBLISHED / "README.md") if page.exists()]
    if not pages:
        raise Problem(f"no {README} here")
    for page in pages:
        before = page.read_text()
        block = r"<!-- ((?:table|runs|speed)\b[^>]*?) -->\n.*?<!-- end -->"
        after = re.sub(block, fill, before, flags=re.S)
        if after != before and check:
            raise Problem(f"{page} does not agree with {PUBLISHED}/: run python train.py --report",
                          1)
        if after != before:
            write_file(page, after.encode())
        say(f"{page}: {'brought up to date' if after != before else 'up to date'}")


def speed_row(line):
    """Cells of a comparison: what, ours, instead, theirs, ratio, memory ours, theirs, ratio."""
    cells = []
    for unit, scale, digits in (("seconds", 1e3, 1), ("MB", 1, 0)):
        ours, theirs = line[f"ours_{unit}"], line.get(unit)
        cells.append([f"{scale * x:,.{digits}f}" if x else "–" for x in (ours, theirs)]
                     + [f"{theirs / ours:.2f}" if ours and theirs else "–"])
    return [line["what"], line["instead"], *cells[0], *cells[1], line["device"]]


def render_speed(entries):
    """README's table of the comparisons that results/ holds; later lines win."""
    lines = {(line["what"], line["instead"], line["device"]): line
             for line in (e["speed"] for e in entries if "speed" in e)}
    return markdown(["forward and backward", "instead", "ms: ours", "instead", "ratio",
                     "MB: ours", "instead", "ratio", "device"], map(speed_row, lines.values()))


def render_runs(runs):
    """The single runs, those of no table; what gradients were clipped to, as recipes gained it."""
    rows = [[f"`{r['environment']['command']}`", r["data"], f"{r['error']:.2f}", r["epochs"],
             r["config"].get("clip") or "never", clock(r["seconds"]),
             r["environment"]["device"]] for r in runs.values() if r["outcome"] == "ok"
            and not re.search("--table|--figure", r["environment"]["command"])]
    return markdown(["command", "data", "test error %", "epochs", "clipped to", "time", "device"],
                    rows)
