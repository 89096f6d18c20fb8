"""Results: what names one, what it was run on, the files of their lines."""
import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import torch

from lab import results
from lab.config import Config, make_config
from lab.results import config_key, environment, read_lines, read_results, record


def test_a_line_without_a_later_field_is_found_by_its_config():
    """As if --clip, --resample, --hold-out and --init had not been there when it was written."""
    line = dataclasses.asdict(make_config(dataset="mnist"))
    later = {name: line.pop(name) for name in ("clip", "resample", "hold_out", "init")}
    config = Config(**json.loads(json.dumps(line)))
    assert later == {name: getattr(config, name) for name in later}
    key = config_key(config)
    free = dict(seed=7, device="cuda", amp=True, recipe="fast", workers=1, output_dir="x")
    assert config_key(dataclasses.replace(config, **free)) == key
    for change in (dict(clip=.5), dict(resample=True), dict(hold_out=True), dict(epochs=99),
                   dict(init="runs/x"), dict(lr=1.0), dict(set={"types": 2})):
        assert config_key(dataclasses.replace(config, **change)) != key, change


def test_results_are_read_by_their_config(tmp_path, monkeypatch):
    """Whatever key a line may hold; the later of two lines wins; benches are kept apart."""
    monkeypatch.chdir(tmp_path)
    config = make_config(dataset="mnist")
    line = {"config": dataclasses.asdict(config), "seed": 3, "error": 1.0, "key": "of old"}
    del line["config"]["clip"]
    for each in (line, {"bench": "b"}, {**line, "error": 2.0}, {"speed": "s"}, {"other": 0}):
        record(each)
    runs, benches, speeds = read_results()
    assert {key: line["error"] for key, line in runs.items()} == {(config_key(config), 3): 2.0}
    assert (benches, speeds) == (["b"], ["s"]) and read_results(own=False) == ({}, [], [])


def test_later_files_win_and_ones_own_results_are_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = {"config": dataclasses.asdict(make_config(dataset="mnist")), "seed": 0}
    Path("results").mkdir()
    for file, error in (("b", 2.0), ("a", 1.0)):
        Path(f"results/{file}.jsonl").write_text(json.dumps({**line, "error": error}))
    (found,) = read_results()[0].values()
    assert found["error"] == 2
    record({**line, "error": 3.0})
    (found,) = read_results(results.OWN)[0].values()
    assert found["error"] == 3


def test_a_result_on_own_images_is_named_by_their_folder_wherever_it_lies():
    here, there, other = (config_key(make_config(dataset="folder", data_path=path))
                          for path in ("a/birds", "/b/birds/", "a/fish"))
    assert here == there != other
    assert config_key(make_config(dataset="mnist", data_path="a")) == \
        config_key(make_config(dataset="mnist", data_path="b"))


def test_a_torn_line_costs_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record({"n": 1})
    results.OWN.write_text(results.OWN.read_text() + '{"n": 2, "to')
    record({"n": 3})
    assert list(read_lines(results.OWN)) == [{"n": 1}, {"n": 3}]
    assert "line 2: torn" in capsys.readouterr().out


def test_one_process_of_several_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        record({"of": rank})
    assert list(read_lines(results.OWN)) == [{"of": 0}]


def test_a_place_that_takes_no_line_stops_nothing(tmp_path, monkeypatch, capsys):
    """runs is a file here; a read-only folder and a full disk raise the same way."""
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    record({"n": 1})
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("words", ["train.py --epochs 2", "-m lab.why 'a b'"])
def test_the_command_of_a_result_can_be_typed_again(words, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python3", *shlex.split(words)])
    assert environment(torch.device("cpu"))["command"] == f"python {words}"


def test_without_git_no_commit_is_named(monkeypatch, tmp_path):
    assert "commit" in environment(torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cpu"))["commit"] is None
