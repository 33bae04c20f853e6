"""The command line: help with examples, errors in one line, strict settings."""

import json
import sys
import tomllib

import click
import pytest

from sbir_ray import cli, strict
from tests.tiny import tiny_pairs


def commands(group, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def run(monkeypatch, capsys, *words):
    """Exit code, standard output, standard error of ``sbir-ray`` with these words."""
    monkeypatch.setattr(sys, "argv", ["sbir-ray", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("path", list(commands(cli.cli)), ids=" ".join)
def test_every_command_has_help_with_an_example(monkeypatch, capsys, path):
    code, out, _ = run(monkeypatch, capsys, *path, "--help")
    assert code == 0
    assert "Example: sbir-ray " + " ".join(path) in " ".join(out.split())


@pytest.mark.parametrize("name", cli.NAMES.values())
def test_printed_settings_are_a_file_that_loads_to_the_defaults(monkeypatch, capsys, name):
    _, out, _ = run(monkeypatch, capsys, "settings", name)
    (cls,) = (c for c, n in cli.NAMES.items() if n == name)
    assert strict.from_dict(cls, tomllib.loads(out)) == cls()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nowhere", "--pairs", "p"], "error: nowhere: not a run folder"),
        (["pairs", "check", "nowhere"], "error: nowhere: not a PAIRS folder"),
        (["train", "retrieval", "--pairs", "p", "--out", "o"], "error: p: does not exist"),
        (
            ["train", "retrieval", "--pairs", ".", "--out", "o", "--set", "optim.step=3"],
            "error: unknown setting optim.step; did you mean optim.steps?",
        ),
        (["train", "semi", "--pairs", ".", "--out", "o"], "error: train semi: give --photos"),
        (["sketch", "--photos", "p", "--out", "o"], "error: sketch: give either --generator"),
        (["pairs", "import", "--layout", "qmul", "--out", "o"], "error: --layout qmul: name"),
        (
            ["pairs", "import", ".", "--layout", "qmul", "--out", "o", "--fold", "5"],
            "error: --fold 5: write it as k/n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    monkeypatch, capsys, tmp_path, words, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_unknown_options_end_with_exit_code_2(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "demo", "--fast")[0] == 2


def test_train_evaluate_and_report_by_themselves(monkeypatch, capsys, tmp_path):
    pairs = tiny_pairs(tmp_path / "pairs")
    small = [
        *("--set", "optim.steps=2", "--set", "optim.batch_size=4", "--set", "model.weights=none"),
        *("--set", "model.image_size=64", "--set", "model.grid=2"),
    ]
    words = ["train", "retrieval", "--pairs", pairs, "--out", tmp_path / "f", "--workers", "0"]
    code, out, _ = run(monkeypatch, capsys, *words, "--seed", "3", *small, "--json")
    assert code == 0
    assert json.loads(out)["validation"]["queries"] == 4
    words = ["evaluate", tmp_path / "f", "--pairs", pairs, "--split", "test", "--per-query"]
    code, out, _ = run(monkeypatch, capsys, *words, "--json")
    found = json.loads(out)
    assert {"acc@1", "acc@5", "acc@10", "mean_rank", "median_rank", "mAP", "ci95"} <= set(found)
    assert (found["queries"], found["gallery"], len(found["per_query"])) == (8, 4, 8)
    assert found["acc@5"] == 1.0  # of four photos
    share = sum(query["rank"] == 1 for query in found["per_query"]) / 8
    assert found["acc@1"] == pytest.approx(share)
    code, out, _ = run(monkeypatch, capsys, "report", tmp_path / "f")
    assert code == 0
    assert "Queries" in (tmp_path / "f" / "report.html").read_text()
    record = json.loads((tmp_path / "f" / "run.json").read_text())
    assert record["config"]["seed"] == 3
    assert record["versions"]["torch"]


def test_split_hides_sketches_and_says_how_many(monkeypatch, capsys, tmp_path):
    pairs = tiny_pairs(tmp_path / "pairs", train=10)
    words = ["pairs", "split", pairs, "--labels", "0.4", "--out", tmp_path / "s", "--json"]
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    counts = json.loads(out)
    assert counts["labelled"] == {"photos": 4, "sketches": 8}
    assert counts["hidden"] == {"photos": 6, "sketches": 12}
