"""Train, test and tabulate the networks of encapnet.py.

    python train.py                                        one to three minutes on a CPU; no data
    python train.py --dataset mnist --model encapnet6      the paper's settings; flags change them
    python train.py --data-path DIR                        your images: DIR/{train,test}/CLASS/*.jpg
    python train.py --resume                               go on with the newest unfinished run
    python train.py --resume RUN --test-only               or --predict IMAGE...
    python train.py --init RUN --data-path DIR ...         start from a trained network's weights
    python train.py --table 3 --seeds 3 --recipe fast      a table of the paper, of three seeds
    python train.py --figure 4 --recipe fast               a figure: runs what its table lacks
    python train.py --bench --model capnet-em --batch-size 4
    torchrun --nproc-per-node 8 train.py --dataset imagenet --augment ++ --data-path DIR
    python train.py --list; python train.py --help         every model, data set, table; every flag

A run is a folder in runs/: log.jsonl (configuration, machine, one entry per epoch), last.pt and
previous.pt (checkpoints), curves.png, result.json.  Killed at any moment it goes on with --resume,
bit for bit on a CPU.  runs/results.jsonl collects the results.

The defaults below are the paper's; for digits and folder there are others, at the end of this page.
"""
import argparse
import dataclasses
import itertools
import os
import re
import sys
import textwrap
from functools import partial

import encapnet
from lab import bench
from lab.checkpoint import load_checkpoint, newest, run_folder
from lab.config import (
    DATASETS,
    FAST,
    OURS,
    PEERS,
    Config,
    Parser,
    make_config,
    merge,
    number,
    tested_on,
)
from lab.fit import clock, fit
from lab.runtime import RUNS, Problem, count, guarded, say
from lab.tables import FIGURES, TABLES, report, show_figure, show_table
from lab.use import predict, test_only


def as_flag(setting):
    name, value = setting
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")


def make_parser():
    """One flag for every field of Config, and the commands."""
    recipes = (textwrap.fill(" ".join([f"{dataset}:", *map(as_flag, settings.items())]), 95,
                             subsequent_indent="    ", break_on_hyphens=False)
               for dataset, settings in {**OURS, "--recipe fast": FAST}.items())
    parser = Parser("train.py", description=__doc__,
                    epilog="Recipes of ours, of a few minutes, unless --recipe paper is asked for "
                           "(digits: also what\ntrains without --dataset):\n" + "\n".join(recipes),
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    commands = parser.add_argument_group("what to do; without one of these: train")
    one = commands.add_mutually_exclusive_group()
    one.add_argument("--table", choices=TABLES, help="run a table of the paper, or a study of ours")
    commands.add_argument("--row", nargs="+", metavar="TEXT",
                          help="with --table: only rows with this in their name")
    commands.add_argument("--seeds", type=number(1), metavar="K",
                          help="with --table: runs of each row (default: 1)")
    one.add_argument("--figure", choices=FIGURES,
                     help="draw a figure of the paper, after running what it lacks")
    one.add_argument("--report", action="store_true", help="render README's tables from results/")
    commands.add_argument("--check", action="store_true",
                          help="with --report: only compare, exit 1 if they differ")
    one.add_argument("--bench", action="store_true", help="measure a training step")
    one.add_argument("--test-only", action="store_true",
                     help="test the network of --resume (default: the newest)")
    one.add_argument("--predict", nargs="+", metavar="IMAGE",
                     help="classify images, or those in folders, by the network of --resume "
                     "(default: the newest)")
    one.add_argument("--list", action="store_true", help="models, data sets, tables")
    commands.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_fields(parser)
    return parser


def add_fields(parser):
    """A flag for every field of Config, in its group."""
    groups = itertools.groupby(dataclasses.fields(Config), lambda field: field.metadata["group"])
    for title, fields in groups:
        group = parser.add_argument_group(title)
        for field in fields:
            flag = dict(field.metadata["flag"])
            if field.type is bool:
                flag["action"] = argparse.BooleanOptionalAction
            elif field.type in (int, float):
                flag.setdefault("type", number(0, field.type))
            told = "default" in flag["help"]
            if field.default not in ("", None, dataclasses.MISSING) and not told:
                flag["help"] += f" (default: {field.default})"
            group.add_argument("--" + field.name.replace("_", "-"), **flag)


def parse(arguments):
    """Command line -> commands {name: value}, Config fields given {name: value}."""
    found = vars(make_parser().parse_args(arguments))
    given = {f.name: found.pop(f.name) for f in dataclasses.fields(Config) if f.name in found}
    for name, kind in (("set", dict), ("milestones", tuple)):
        if name in given:
            given[name] = kind(given[name])
    given |= {k: os.path.expanduser(v) for k, v in given.items() if isinstance(v, str)}
    return found, given


def with_run(given, finished):
    """The run of --resume, or where no path was given the newest."""
    path = given.get("resume") or given.get("output_dir") or newest(finished)
    if not path:
        raise Problem(f"no {'' if finished else 'unfinished '}run in {RUNS}/; give --resume PATH")
    return {**given, "resume": path}


def train(given):
    """Plain training: a new run, or the rest of an old one, whose settings then hold."""
    if "resume" in given:
        path = with_run(given, finished=False)["resume"]
        here = {"resume": None, "output_dir": str(run_folder(path))}
        result = fit(Config(**merge(load_checkpoint(path)["config"], given, here)))
    else:
        if "data_path" in given and "dataset" not in given:
            say("--data-path without --dataset: --dataset folder")
            given = {**given, "dataset": "folder"}
        result = fit(make_config(**given))
    error = f"{tested_on(Config(**result['config']))} error"
    say(f"curves and predictions: {result['folder']}/curves.png")
    if result["unbalanced"]:
        worst = sorted((e, name) for name, e in result["class_errors"].items() if e is not None)
        say("some classes have more images than others; those most often wrong:",
            ", ".join(f"{name} {e:.1f} %" for e, name in worst[:-4:-1]))
    guess = "; at chance: no better than always naming the class that most images are of"
    crops = ", mean over several crops," * result["multi_crop"]
    say(f"{error} {result['error']:.2f} %{crops} after {count(result['epochs'], 'epoch')} and "
        f"{clock(result['seconds'])}{guess * (result['outcome'] == 'at chance')}")


def show_list():
    print("models, with what sets them apart (--set changes it):")
    for name, model in encapnet.MODELS.items():
        side = model.image_size
        print(f"  {name:18} {model.network.__name__}, {model.parameters:,} parameters,",
              f"{side}x{side} images", *(f"{k}={v}" for k, v in model.keywords.items()))
    for name in PEERS:
        print(f"  {name:18} torchvision.models.{name}")
    print("data sets:")
    for name, source in DATASETS.items():
        print(f"  {name:18} {source.note}")
    print("tables and figures:")
    for kind, found in (("table", TABLES), ("figure", FIGURES)):
        for k, parts in found.items():
            titles = dict.fromkeys(re.split("[;:]", part.title)[0] for part in parts)
            print(f"  --{kind} {k:<8}", "; ".join(titles) or "architectures")


def check_commands(commands, given):
    """Reject flags that the command ignores."""
    for flag, needed in (("check", "report"), ("row", "table"), ("seeds", "table")):
        if flag in commands and needed not in commands:
            raise Problem(f"--{flag}: of use with --{needed} alone")
    for name in ("model", "resume", "output_dir"):
        if name in given and {"table", "figure"} & set(commands):
            raise Problem(f"--{name.replace('_', '-')}: --table and --figure choose it themselves")
    for name in ("resume", "init", "output_dir"):
        if name in given and "bench" in commands:
            raise Problem(f"--{name.replace('_', '-')}: of no use with --bench")
    rows = [row[0] for part in TABLES.get(commands.get("table"), ()) for row in part.rows]
    for word in commands.get("row", ()):
        if not any(word in row for row in rows):
            raise Problem(f"--row {word!r}: no such row; choose from "
                          f"{', '.join(dict.fromkeys(rows)) or 'none: networks alone'}")


def command(commands, given):
    check_commands(commands, given)
    if "list" in commands:
        return show_list()
    if "report" in commands:
        return report("check" in commands, parse)
    if "bench" in commands:
        return bench.bench_step(make_config(**given))
    if "figure" in commands:
        return show_figure(commands["figure"], given)
    if "table" in commands:
        return show_table(commands["table"], commands.get("row", ()), commands.get("seeds", 1),
                          given)
    if "predict" in commands:
        return predict(commands["predict"], with_run(given, finished=True))
    if "test_only" in commands:
        return test_only(with_run(given, finished=True))
    return train(given)


main = partial(guarded, "train.py", lambda words: command(*parse(words)))

if __name__ == "__main__":
    sys.exit(main())
