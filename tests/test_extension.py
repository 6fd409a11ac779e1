"""A task, a method and a study, each in one short file outside the packages, are known to all commands."""

import importlib
import inspect
import json
import sys

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks_command
from benchmarks import report
from examples import resume, sweep
from examples.harness import runner
from examples.harness.cli import main
from examples.harness.engine import Results
from examples.harness.errors import UsageError

from . import toy, toy_study

pytestmark = pytest.mark.usefixtures("lenient", "shared_programs")


def command(monkeypatch, main, line):
    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    main()


def test_each_is_a_short_file():
    task, study = inspect.getsource(toy), inspect.getsource(toy_study)
    for further in (toy.LossToy, toy.ema, toy.ma):
        task = task.replace(inspect.getsource(further) + "\n\n", "")
    assert max(len(text.splitlines()) for text in (task, METHOD, study)) <= 60


def test_a_task_is_a_command_that_is_resumed_and_swept(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    assert main(toy.EXPERIMENT, ["ma", "--max-steps", "8", "--out", str(folder)]) == 0
    runner.train(*resume.parse([str(folder), "--max-steps", "12"]), resume=True)
    assert (folder / "metrics.csv").read_text().count("\n") == 1 + 3
    flags = "--methods ma ema --grid lamb=1,2 max-steps=8 --seeds 0 1"
    command(monkeypatch, sweep.main, f"tests.toy {flags} --out {tmp_path / 'sweep'}")
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["method", "lamb", "seeds"],
        *([method, lamb, "2"] for method in ("ma", "ema") for lamb in "12"),
    ]
    assert len(Results(tmp_path / "sweep" / "results.jsonl").frame()) == 8


METHOD = '''
import sys
from grokfast_jax import amplify, ema, parallel
import optax
from examples.harness.cli import main
from examples.harness.experiment import Experiment
from examples.harness.methods import Lamb, LearningRate, Tx
from tests import toy


def two_emas(lr: LearningRate = 0.01, lamb: Lamb = 2.0) -> Tx:
    """The mean of a short and a long EMA before Adam."""
    return optax.chain(amplify(parallel((0.5, ema(0.9)), (0.5, ema(0.99))), lamb), toy.adam(lr))


EXPERIMENT = Experiment("mine", toy.Toy(), {"two-emas": two_emas, "adam": toy.adam}, default="two-emas")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
'''


def test_a_method_is_a_function_and_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    experiment = importlib.import_module("mine").EXPERIMENT
    folder = tmp_path / "run"
    assert main(experiment, ["two-emas", "--lamb", "3", "--max-steps", "4", "--out", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["experiment"], config["method"], config["lamb"], config["lr"]) == ("mine", "two_emas", 3.0, 0.01)
    found, run, _ = runner.stored(folder)
    assert (found, run.method) == (experiment, experiment.methods["two-emas"])
    with pytest.raises(SystemExit, match="0"):
        main(experiment, ["--help"])
    assert "• two-emas The mean of a short and a long EMA before Adam." in " ".join(capsys.readouterr().out.split())


def test_a_study_is_run_by_the_command(tmp_path, monkeypatch, capsys):
    run = f"run tests.toy_study --out {tmp_path}"
    command(monkeypatch, benchmarks_command.main, run)
    printed = capsys.readouterr().out
    frame = toy_study.STUDY.results(tmp_path).frame()
    assert frame.groupby(["method", "lr"]).size().to_dict() == {
        ("ema", 0.01): 8,
        ("adam", 0.01 * (1 + frame.groupby("lamb")["steps_to_80"].median().idxmin())): 2,
    }
    assert np.isfinite(frame["norm"]).all()
    steps = f"{frame.loc[frame['method'] == 'adam', 'steps_to_80'].median():,.0f}"
    assert "\ntoy_study\n\n| method" in printed
    assert "\ntoy_study_norms\n\n| method" in printed
    assert [cell.strip() for cell in printed.split("| adam")[1].split("|")[1:4]][1:] == ["2", steps]
    assert (tmp_path / "toy_study.png").read_bytes().startswith(b"\x89PNG")

    before = (tmp_path / "toy_study.jsonl").read_bytes()
    command(monkeypatch, benchmarks_command.main, run)  # which has nothing to train
    assert (tmp_path / "toy_study.jsonl").read_bytes() == before
    assert capsys.readouterr().out == printed
    page = "# Page\n\n<!-- toy_study -->\n<!-- end of toy_study -->\nend\n"
    filled = report.fill(page, toy_study.STUDY.made_tables(tmp_path))
    assert filled == page.replace("-->\n<!--", f"-->\n\n{toy_study.STUDY.made_tables(tmp_path)['toy_study']}\n<!--")
    assert report.fill(filled, toy_study.STUDY.made_tables(tmp_path)) == filled


def test_a_study_without_results_has_no_figure(tmp_path):
    assert toy_study.STUDY.made_figures(tmp_path) == {}
    assert set(toy_study.STUDY.made_tables(tmp_path)) == {"toy_study", "toy_study_norms"}


def test_an_unknown_study_is_named(monkeypatch):
    with pytest.raises(UsageError, match=r"the study must be one of .*effective_lr, .*importable.* got 'tests.toy'"):
        command(monkeypatch, benchmarks_command.main, "run tests.toy")
