"""Tables and figures: what has been run is found, what has not is run, then rendered or drawn.

Rows are those of paper.py; results are the lines of results/*.jsonl and of runs/results.jsonl.
"""
import dataclasses
import os
import re
import shlex
import statistics
from pathlib import Path

import torch

import encapnet
from lab import bench
from lab.config import merge, tested_on
from lab.figures import draw_figure2, draw_figure4
from lab.fit import clock, fit, make_model
from lab.paper import CIFAR10, FIGURES, TABLES, asked_parts, part_cells, part_columns, row_config
from lab.results import PUBLISHED, as_json, config_key, data_name, environment, read_results, record
from lab.runtime import RUNS, Diverged, Problem, count, pick_device, rank, reason, say

README = Path("README.md")
PAPERS = ("dataset", "image_size", "train_images", "test_images", "hold_out", "set", "epochs")


# ---- The runner ----------------------------------------------------------------------------------

def of_seeds(config, runs):
    """The results of a Config, one per seed."""
    return [line for (key, _), line in sorted(runs.items()) if key == config_key(config)]


def attempt(name, function, *arguments):
    """function(*arguments) -> [], or [what went wrong]; being asked to stop stops all."""
    say(f"--- {name}")
    try:
        function(*arguments)
        return []
    except (Problem, RuntimeError, OSError, MemoryError) as failure:     # out of memory, mostly
        if getattr(failure, "code", 1) > 128:
            raise
        told = str(failure) if isinstance(failure, Problem) else reason(failure)
        say(f"failed: {name}: {told}")
        return [f"{name}: {told}"]


def run_cell(config, runs):
    """Run a Config, or go on with its run; training that diverges is a result."""
    key = config_key(config)
    folder = str(RUNS / f"{data_name(config)}-{config.model}-{key}-{config.seed}")
    try:
        runs[key, config.seed] = fit(dataclasses.replace(config, output_dir=folder))
    except Diverged as failure:
        runs[key, config.seed] = line = {
            "seed": config.seed, "epochs": config.epochs, "error": None, "folder": folder,
            "outcome": str(failure).split(";")[0], "config": dataclasses.asdict(config),
            "environment": environment(pick_device(config.device))}
        record(line)


def run_missing(cells, seeds, runs):
    """Run what is missing among cells {(row, column): Config} -> what went wrong."""
    failures, several = [], len({column for _, column in cells}) > 1
    for (row, column), config in cells.items():
        name = ", ".join(filter(None, dict.fromkeys([row, column * several, data_name(config)])))
        for seed in range(config.seed, config.seed + seeds):
            if (config_key(config), seed) not in runs:
                failures += attempt(f"{name}, seed {seed}", run_cell,
                                    dataclasses.replace(config, seed=seed), runs)
    return failures


def refuse(failures):
    if failures:
        raise Problem(f"{count(len(failures), 'run')} failed: {'; '.join(failures)}", 1)


def measure_costs(part, given):
    """Bench the rows of Table 1 at the paper's batch."""
    for name, changes, paper in part.rows:
        config = row_config(CIFAR10, changes, given, dict(batch_size=paper["cost"][2]))
        device = environment(pick_device(config.device))["device"]
        known = bench.costs_of(config, read_results()[1])
        if device not in [line["device"] for line in known]:
            attempt(f"{name}: memory and time at batch {config.batch_size}",
                    bench.bench_step, config)


def show_table(name, only, seeds, given):
    """Run what a table lacks, and print it."""
    parts, runs = asked_parts(TABLES[name], given, only), read_results()[0]
    if name == "1" and "WORLD_SIZE" not in os.environ:   # under torchrun processes share a step
        measure_costs(parts[0], given)
    failures = [failure for part in parts
                for failure in run_missing(part_cells(part, given), seeds, runs)]
    say("\n" + "\n\n".join(render_table(name, given, runs, read_results()[1], only)))
    refuse(failures)


def show_figure(name, given):
    """Run what a figure lacks, and draw it into runs/."""
    (part,), runs, drawn = FIGURES[name], read_results()[0], {}
    cells = part_cells(part, given)
    refuse(run_missing(cells, 1, runs))
    for (row, column), config in cells.items():
        if lines := [line for line in of_seeds(config, runs) if line["error"] is not None]:
            drawn[f"{column} {row}".strip()] = lines
    title = f"{part.title}, {seen_at(config)}"
    if not drawn:
        raise Problem(f"--figure {name}: nothing to draw, every run of {title} has diverged", 1)
    if rank() == 0:
        draw = {"2": draw_figure2, "4": draw_figure4}[name]
        draw(drawn, title, RUNS / f"figure-{name}.png")


# ---- Rendering -----------------------------------------------------------------------------------

def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def render_table(name, given, runs, benches, only=(), page=False):
    """-> [a block of Markdown, ...]   page: of a file, which leaves out what was not run"""
    if name == "2":
        return [architecture("encapnet", given), architecture("resnet18", given)]
    parts = asked_parts(TABLES[name], given, only)
    costs = [render_costs(part, given, benches) for part in parts if name == "1"]
    title = f"Table {name}" if name.isdigit() else name
    return costs + [render_part(title, part, given, runs, page) for part in parts]


def summary(config, paper, runs):
    """A cell, over all seeds known -> (paper, ours, difference), how: (seeds, epochs, devices)."""
    theirs = f"{paper:.2f}" if isinstance(paper, float) else paper or "–"
    lines = of_seeds(config, runs) if config else ()
    if not lines:
        return (theirs, "–", "–"), ()
    devices = " and ".join(sorted({line["environment"]["device"] for line in lines}))
    how = count(len(lines), "seed"), count(lines[0]["epochs"], "epoch"), devices
    bad = [line["outcome"] for line in lines if line["outcome"] != "ok"]
    if bad:
        failed = "fail" if len(bad) == len(lines) else f"{len(bad)} of {len(lines)} fail"
        return (theirs, f"{failed} ({bad[0]})", "–"), how
    errors = [line["top5_error" if config.dataset == "imagenet" else "error"] for line in lines]
    mean = statistics.mean(errors)
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    difference = f"{mean - paper:+.2f}" if isinstance(paper, float) else "–"
    return (theirs, f"{mean:.2f}{spread}", difference), how


def render_part(table, part, given, runs, page):
    """One block: of each column paper | ours | difference, which compares like with like alone.

    A study: ours.  page: without the rows that were not run
    """
    columns, configs = part_columns(part, given), part_cells(part, given)
    printed = part_cells(part, {})
    same = all(as_json(config, PAPERS) == as_json(printed[cell], PAPERS)
               for cell, config in configs.items())
    shown = slice(1, 2) if part.study else slice(2 + same)
    header = list(columns) if part.study else [
        f"{column} {kind}" if len(columns) > 1 else kind
        for column in columns for kind in ("paper", "ours", "difference")[shown]]
    rows = []
    for row, _, paper in part.rows:
        found = [summary(configs.get((row, column)), paper.get(column), runs) for column in columns]
        each = [" / ".join(words if len(set(words)) > 1 else words[:1])      # one per column
                for words in zip(*(how for _, how in found if how), strict=True)]
        rows.append([row, *(cell for cells, _ in found for cell in cells[shown]),
                     ", ".join(each) or "–"])
    title = f"**{table}: {part.title}.**"
    if page:
        rows = [row for row in rows if row[-1] != "–"]
        if not rows:
            return f"{title} Not run."
    ours = "" if same or part.study else "ours: "
    return f"{title} {caption(part, given, ours)}\n\n{markdown(['', *header, 'how'], rows)}"


def caption(part, given, ours):
    """Of a block's errors: data, number of training images, the keywords common to its networks."""
    configs = part_cells(part, given).values()
    first, common = next(iter(configs)), merge(part.base, given)["set"]
    words = [" and ".join(dict.fromkeys(map(seen_at, configs)))]
    if first.train_images:
        words.append(count(first.train_images, "training image"))
    if first.hold_out:
        words.append("every tenth held out")
    elif first.test_images:
        words.append(count(first.test_images, "test image"))
    words += [f"{name}={value}" for name, value in common.items()]
    return f"{tested_on(first).capitalize()} error in %; {ours}{', '.join(words)}."


def seen_at(config):
    """The data of a Config and the size that the network sees them at."""
    return f"{data_name(config)} at {config.image_size}x{config.image_size}"


def render_costs(part, given, benches):
    """Table 1's parameters, memory and time per batch."""
    rows = []
    for name, changes, paper in part.rows:
        size, memory, batch, seconds = paper["cost"]
        config, ours = row_config(CIFAR10, changes, given, dict(batch_size=batch)), 3 * ["–"]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in make_model(config, 10, 3).parameters())
        for line in bench.costs_of(config, benches):
            ours = (f"{line['memory_MB']:,.0f}", f"{line['forward_backward_seconds']:.3f}",
                    line["device"])
        rows.append([name, batch, size, f"{16 * parameters / 2 ** 20:.2f}", f"{memory:,}", ours[0],
                     seconds, *ours[1:]])
    return ("**Table 1: cost.** Mb of parameters: 16 bits each, in 2^20 bits; runtime: forward and "
            "backward of a batch.\n\n") + markdown(
        ["", "batch", "Mb of parameters: paper", "ours", "MB of memory: paper", "ours",
         "s a batch: paper", "ours", "device"], rows)


@torch.no_grad()
def architecture(model, given):
    """Table 2 of the built network: the size of each part's output."""
    config = row_config(CIFAR10, dict(model=model, set=dict(feedback=0)),
                        {"set": given.get("set", {})})
    network = make_model(config, 10, 3).eval()
    u = network.stem(torch.zeros(1, 3, config.image_size, config.image_size))
    outputs = [("M0", network.stem, "convolution", u)]
    for k, block in enumerate(network.blocks, 1):
        _, u = block(u)
        first, *rest = (type(layer).__name__ for layer in block.modules()
                        if isinstance(layer, (encapnet.CapConv, encapnet.ResidualBlock)))
        outputs.append((f"M{k}", block, f"{1 + len(rest)} {first}", u))
    outputs.append(("classes", network.classes, type(network.classes).__name__, network.scores(u)))
    rows = [[name, layers, " x ".join(map(str, out.shape[1:])),
             f"{sum(p.numel() for p in part.parameters()):,}"]
            for name, part, layers, out in outputs]
    return f"**Table 2: {model}.**\n\n" + markdown(["", "layers", "output", "parameters"], rows)


def render_runs(runs):
    """The single runs, those of no table."""
    rows = [[f"`{r['environment']['command']}`", r["data"], f"{r['error']:.2f}", r["epochs"],
             clock(r["seconds"]), r["environment"]["device"]] for r in runs.values()
            if r["outcome"] == "ok"
            and not re.search("--table|--figure", r["environment"]["command"])]
    return markdown(["command", "data", "test error %", "epochs", "time", "device"], rows)


def render_speed(speeds):
    """The comparisons that results/ holds; later lines win."""
    rows = {}
    for line in speeds:
        cells = [line["what"], line["instead"]]
        for unit, scale, digits in (("seconds", 1e3, 1), ("MB", 1, 0)):
            ours, theirs = line[f"ours_{unit}"], line[unit]
            cells += [f"{scale * x:,.{digits}f}" if x else "–" for x in (ours, theirs)]
            cells.append(f"{theirs / ours:.2f}" if ours and theirs else "–")
        rows[line["what"], line["instead"], line["device"]] = [*cells, line["device"]]
    return markdown(["forward and backward", "instead", "ours, ms", "instead, ms", "ratio",
                     "ours, MB", "instead, MB", "ratio", "device"], rows.values())


# ---- README's blocks -----------------------------------------------------------------------------

def render_block(words, results, parse):
    """What stands below <!-- words -->: runs; speed; or a table, 3/2 its second block alone.

    words: of a table also its flags, --row among them
    """
    (runs, benches, speeds), (kind, *words) = results, shlex.split(words)
    if kind != "table":
        return render_runs(runs) if kind == "runs" else render_speed(speeds)
    (table, _, part), (found, given) = words[0].partition("/"), parse(words[1:])
    blocks = render_table(table, given, runs, benches, found.get("row", ()), page=True)
    if part:
        blocks = blocks[int(part) - 1:int(part)]
    return "\n\n".join([*blocks, f"`python train.py --table {shlex.join([table, *words[1:]])}`"])


def report(check, parse):
    """Render the blocks of README.md and results/README.md from the lines of results/.

    <!-- table 3 --epochs 20 ... --> to <!-- end -->
    parse: words of a command line -> commands, fields of Config given
    """
    results = read_results(own=False)
    if not README.exists():
        raise Problem(f"no {README} here")
    for page in (README, *PUBLISHED.glob("README.md")):
        before = page.read_text()
        after = re.sub(r"<!-- ((?:table|runs|speed)\b[^>]*?) -->\n.*?<!-- end -->",
                       lambda match: f"<!-- {match[1]} -->\n"
                       f"{render_block(match[1], results, parse)}\n<!-- end -->",
                       before, flags=re.S)
        if after != before:
            if check:
                raise Problem(f"{page} does not agree with {PUBLISHED}/: run python train.py "
                              "--report", 1)
            page.write_text(after)
        say(f"{page}: up to date")
