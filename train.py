"""Train, test and tabulate the networks of encapnet.py.

    python train.py                                        three minutes on a laptop; needs no data
    python train.py --dataset mnist --model encapnet6      the paper's settings; flags change them
    python train.py --dataset folder --data-path DIR       your images: DIR/{train,test}/CLASS/*.jpg
    python train.py --resume                               go on with the newest unfinished run
    python train.py --resume RUN --test-only               or --predict IMAGE...
    python train.py --init RUN --data-path DIR ...         start from a trained network's weights
    python train.py --table 3 --seeds 3 --recipe fast      a table of the paper; also --figure 2, 4
    python train.py --bench --model capnet-em --batch-size 4
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-path DIR
    python train.py --list; python train.py --help         every model, data set, table; every flag

A run is a folder, runs/DATASET-MODEL-0 and counting: log.jsonl (configuration, machine, an entry an
epoch), last.pt and previous.pt (checkpoints), curves.png, result.json.  Killed at any moment it
goes on with --resume, or when the same command with an --output-dir is given again, bit for bit on
a CPU.  runs/results.jsonl collects the results.

Your images: DIR/train/CLASS/* and DIR/test/CLASS/* (or val); each is resized by its short side and
its middle cut out, so that all are squares of --image-size.

Several processes (torchrun) share each batch.  On GPUs, BatchNorm sees the whole of it; on a CPU
each process's BatchNorm sees its own part, so that two do not train exactly as one does.
"""
import argparse
import dataclasses
import re
import sys

import encapnet
from lab import bench
from lab.checkpoint import load_checkpoint, newest, run_folder
from lab.config import (
    DATASETS,
    MODEL_SIDE,
    RECIPES,
    Config,
    Parser,
    flags,
    make_config,
    merge,
    models,
    number,
    tested_on,
)
from lab.fit import clock, fit
from lab.runtime import RUNS, Problem, count, guarded, say
from lab.tables import FIGURES, TABLES, report, show_figure, show_table
from lab.use import predict, test_only


def name_of(text):
    """A table's or figure's number, or the name of a study."""
    return int(text) if text.isdigit() else text


def make_parser():
    """One flag for every field of Config, and the commands."""
    parser = Parser("train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="Defaults are the paper's, but without --dataset or with --dataset "
                           f"digits:\n{' '.join(flags(RECIPES['digits']))}",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    commands = parser.add_argument_group("what to do; without one of these: train")
    commands.add_argument("--table", type=name_of, choices=[1, 2, *list(TABLES)[1:]],
                          help="run a table of the paper, or a study of ours")
    commands.add_argument("--row", nargs="+", metavar="TEXT",
                          help="with --table: run and print only rows with this in their "
                               "name")
    commands.add_argument("--seeds", type=number(1), metavar="K",
                          help="with --table, --figure: runs of each row (default: 1)")
    commands.add_argument("--figure", type=name_of, choices=list(FIGURES),
                          help="run and draw a figure of the paper, or draw a study")
    commands.add_argument("--report", action="store_true",
                          help="render README's tables from results/")
    commands.add_argument("--check", action="store_true",
                          help="with --report: only compare, exit 1 if it differs")
    commands.add_argument("--bench", nargs="?", const="step",
                          choices=("step", "routing", "sinkhorn", "network", "scaling"),
                          help="speed and memory of training, or of its parts beside others' code")
    commands.add_argument("--test-only", action="store_true",
                          help="test the network of --resume (default: newest)")
    commands.add_argument("--predict", nargs="+", metavar="IMAGE",
                          help="images or folders: classify with the network of --resume")
    commands.add_argument("--list", action="store_true", help="models, data sets, tables")
    commands.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_fields(parser)
    return parser


def add_fields(parser):
    """A flag for every field of Config, in its group."""
    groups = {}
    for field in dataclasses.fields(Config):
        about = field.metadata
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        flag = dict(about["flag"])
        if field.type is bool:
            flag["action"] = argparse.BooleanOptionalAction
        elif field.type in (int, float):
            flag.setdefault("type", number(0, field.type))
        if not {"choices", "action", "metavar"} & set(flag):
            flag["metavar"] = field.name.rpartition("_")[2].upper()
        if field.default not in ("", None, dataclasses.MISSING):
            several = isinstance(field.default, tuple)
            shown = " ".join(map(str, field.default)) if several else field.default
            flag["help"] += f" (default: {shown})"
        groups[about["group"]].add_argument("--" + field.name.replace("_", "-"), **flag)


def parse(arguments):
    """Command line -> commands {name: value}, Config fields given {name: value}."""
    found = vars(make_parser().parse_args(arguments))
    given = {f.name: found.pop(f.name) for f in dataclasses.fields(Config) if f.name in found}
    for name, kind in (("set", dict), ("milestones", tuple)):
        if name in given:
            given[name] = kind(given[name])
    return found, given


def with_run(given, finished):
    """The run of --resume, or where no path was given the newest."""
    path = given.get("resume") or given.get("output_dir") or newest(finished)
    if not path:
        kind = "" if finished else "unfinished "
        raise Problem(f"no {kind}run in {RUNS}/; give --resume PATH")
    return {**given, "resume": path}


def train(given):
    """Plain training: a new run, or the rest of an old one, whose settings then hold."""
    if "resume" in given:
        path = with_run(given, finished=False)["resume"]
        here = {"resume": None, "output_dir": str(run_folder(path))}
        result = fit(Config(**merge(load_checkpoint(path)["config"], given, here)))
    else:
        result = fit(make_config(**given))
    best, note = result["best_by_test_error"], ""
    error = f"{tested_on(Config(**result['config']))} error"
    if best["epoch"]:
        centre = f"by the centre crop {result['curves']['test_error'][-1]:.2f} %, "
        note = (f" ({centre * result['multi_crop']}the best epoch by {error}, {best['epoch']}: "
                f"{best['test_error']:.2f} %)")
    say(f"{error} {result['error']:.2f} % after {count(result['epochs'], 'epoch')} and "
        f"{clock(result['seconds'])}{note}")
    say(f"curves and predictions: {result['folder']}/curves.png")


def show_list():
    print("models, with what sets them apart (--set changes it):")
    for name in models():
        cls, keywords = encapnet.MODELS.get(name, (None, {}))
        side = MODEL_SIDE.get(name, 0)
        about = [f"{side}x{side} images"] * (side > 0) + [f"{k}={v}" for k, v in keywords.items()]
        print(f"  {name:18}", cls.__name__ if cls else f"torchvision.models.{name}", *about)
    print("data sets:")
    for name, source in DATASETS.items():
        print(f"  {name:18} {source.note}")
    print("tables and figures:")
    for k in (1, 2, *list(TABLES)[1:]):
        titles = [part.title for part in TABLES[k]] if k in TABLES else ["architectures"]
        print(f"  --table {k:<9}", "; ".join(re.split("[;:]", title)[0] for title in titles))
    for k, (title, _) in FIGURES.items():
        print(f"  --figure {k:<8}", title)


def check_commands(commands, given):
    """One command at a time, with the flags that it heeds."""
    heeded = {"list": (), "report": ("check",), "bench": (), "table": ("row", "seeds"),
              "figure": ("seeds",), "test_only": (), "predict": ()}
    asked = [name for name in heeded if name in commands]
    def told(names):
        return ", ".join(sorted("--" + name.replace("_", "-") for name in names))
    if len(asked) > 1:
        raise Problem(f"{told(asked)}: one at a time")
    known = heeded[asked[0]] if asked else ()
    if idle := [name for name in commands if name not in (*asked, *known, "debug")]:
        raise Problem(f"{told(idle)}: no use " + (f"with {told(asked)}" if asked else "alone"))
    if commands.get("bench", "step") != "step" and set(given) - {"device"}:
        raise Problem(f"{told(set(given) - {'device'})}: no use with --bench {commands['bench']}")
    if not {"table", "figure"} & set(commands):
        return
    if "model" in given or "resume" in given:
        raise Problem("--table and --figure choose the models and resume by themselves: "
                      "no --model, no --resume")
    if "table" in commands and "output_dir" in given:
        raise Problem("--table keeps its runs in runs/: no --output-dir")
    if commands.get("table") == 2 and {"row", "seeds"} & set(commands):
        raise Problem("--table 2 is of networks, without a run: no --row, no --seeds")
    if commands.get("figure", 4) != 4 and commands.get("seeds", 1) > 1:
        shown = FIGURES[commands["figure"]][1] and "one run of each routing"
        raise Problem(f"--figure {commands['figure']} shows {shown or 'what its table has run'}: "
                      "no --seeds")
    rows = [row[0] for part in TABLES.get(commands.get("table"), ()) for row in part.rows]
    for word in commands.get("row", ()):
        if not any(word in row for row in rows):
            raise Problem(f"--row {word!r}: no such row; choose from {', '.join(rows)}")


def command(commands, given):
    check_commands(commands, given)
    if "list" in commands:
        return show_list()
    if "report" in commands:
        return report("check" in commands, parse)
    if "bench" in commands:
        return bench.run_bench(commands["bench"], make_config(**given))
    if "figure" in commands:
        return show_figure(commands["figure"], commands.get("seeds", 1), given)
    if "table" in commands:
        return show_table(commands["table"], commands.get("row", ()), commands.get("seeds", 1),
                          given)
    if "predict" in commands:
        return predict(commands["predict"], with_run(given, finished=True))
    if "test_only" in commands:
        return test_only(with_run(given, finished=True))
    return train(given)


def main(arguments=None):
    """-> exit code"""
    return guarded("train.py", lambda words: command(*parse(words)), arguments)


if __name__ == "__main__":
    sys.exit(main())
