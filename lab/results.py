"""Results: what names one, what it depends on besides its settings, and the files of their lines.

A line of results.jsonl holds the whole Config of its run, which names the result: a field of Config
that came after a line has its default there.
"""
import dataclasses
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from lab.config import Config
from lab.runtime import RUNS, count, rank, reason, say, world

OWN, PUBLISHED = RUNS / "results.jsonl", Path("results")


def data_name(config):
    """The name of the data in tables: a folder's own, so cifar10-jpeg is not taken for cifar10."""
    return Path(config.data_path).resolve().name if config.dataset == "folder" else config.dataset


def as_json(config, names):
    """Fields as a line of results has them: tuples are lists."""
    return json.loads(json.dumps({name: getattr(config, name) for name in names}))


def identity(config):
    """The fields that decide a result, as JSON; epochs apart, which may grow."""
    names = [f.name for f in dataclasses.fields(Config) if not f.metadata["free"]]
    return {**as_json(config, names), "dataset": data_name(config)}


def config_key(config):
    """A name for the result, the same for every seed, and for every recipe of these settings."""
    fields = {**identity(config), "epochs": config.epochs, "seed": None, "recipe": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def environment(device):
    """What a result depends on besides its Config."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short",
                              "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:                                       # no git here
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type.upper()}, {count(torch.get_num_threads(), 'thread')}"
    return {"device": name, "processes": world(), "torch": str(torch.__version__),
            "python": platform.python_version(), "commit": commit,
            "command": shlex.join(["python", *sys.orig_argv[1:]])}


def record(line):
    """One more line of runs/results.jsonl, after one that a kill left torn if there is one."""
    if rank() > 0:
        return
    try:
        RUNS.mkdir(exist_ok=True)
        torn = OWN.exists() and not OWN.read_bytes().endswith(b"\n")
        with open(OWN, "a") as lines:
            lines.write("\n" * torn + json.dumps(line) + "\n")
    except OSError as error:                              # the run's own folder may be elsewhere
        say(f"not recorded in {OWN}: {reason(error)}")


def read_lines(*files):
    """The entries of JSON-lines files; a torn line is reported and left out."""
    for file in files:
        for n, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
            try:
                yield json.loads(line)
            except ValueError:
                say(f"{file}, line {n}: torn, left out")


def read_results(own=True):
    """runs {(config key, seed): line}, later lines win, and the lines of both kinds of benches.

    own: those of runs/ after the published ones
    """
    published = sorted(PUBLISHED.glob("*.jsonl"))
    lines = list(read_lines(*published, OWN) if own else read_lines(*published))
    runs = {(config_key(Config(**line["config"])), line["seed"]): line
            for line in lines if "config" in line}
    return runs, *([line[kind] for line in lines if kind in line] for kind in ("bench", "speed"))
