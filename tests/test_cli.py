"""The command line: a method with its hyperparameters, the flags of a run, plain messages, exit codes."""

import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest

from examples import resume
from examples.harness import runner
from examples.harness.cli import main, parse
from examples.harness.engine import product
from examples.harness.errors import RunInterruptedError, UsageError, UserError, plain_errors
from examples.harness.experiment import Experiment, Run, find_experiment
from examples.harness.methods import Lamb, LearningRate, Static, Tx, hyperparams
from examples.harness.run_folder import RunFolder, to_json
from examples.harness.runner import Options, stored
from examples.modular import Modular
from examples.shakespeare import Shakespeare
from grokfast_jax import grokfast_ema

from . import toy

ROOT = Path(__file__).parents[1]


def words(text):
    return parse(toy.EXPERIMENT, text.split())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("EXPERIMENT = 3", "EXPERIMENT is of type int"),
        ("", "EXPERIMENT is of type NoneType"),
        ("x = (", r"SyntaxError: '\(' was never closed \(broken.py, line 1\)"),
        ("import math\n1 / 0", r"ZeroDivisionError: division by zero, .*broken\.py, line 2"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_what_is_wrong_with_a_module_is_said_in_one_line(text, reason, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UsageError, match=rf"importable module that has an object EXPERIMENT, got 'broken' \({reason}"):
        find_experiment("broken")


def refused(text, capsys, experiment=toy.EXPERIMENT):
    """What a command line that cannot be read is answered with."""
    try:
        status = main(experiment, text.split())
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in printed.out + printed.err
    return " ".join(printed.err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("line", "method", "given", "rule"),
    [
        ("", toy.ema, {}, {}),
        ("ma", toy.ma, {}, {}),
        ("--lamb 3 --seed 4", toy.ema, {"lamb": 3.0}, {"seed": 4}),
        ("ma --lamb 3 --seed 4", toy.ma, {"lamb": 3.0}, {"seed": 4}),
        ("--seed 4 ma --window-size 3", toy.ma, {"window_size": 3}, {"seed": 4}),
        ("--max-steps 8 adam --stop-at 0.5 --hold-evals 2", toy.adam, {}, {"max_steps": 8, "stop_at": 0.5}),
        ("--stop-at None ema --alpha 0.5", toy.ema, {"alpha": 0.5}, {"stop_at": None}),
    ],
)
def test_flags_stand_before_or_after_the_methods_name(line, method, given, rule):
    run, options = words(line)
    assert (run.task, run.method) == (toy.Toy(), method)
    assert run.hyperparams == hyperparams(method, **given)
    assert {name: getattr(run, name) for name in rule} == rule
    assert run.hold_evals == (2 if "hold" in line else 0)
    assert options == Options()


def test_task_and_options_are_flags_too():
    run, options = words("ma --examples 40 --out x --devices 2 --checkpoint-every 3 --matmul-precision default")
    assert run.task == toy.Toy(examples=40)
    assert options == Options(out=Path("x"), devices=2, checkpoint_every=3, matmul_precision="default")


def test_a_partial_has_other_defaults_and_the_same_flags():
    methods = {"ema": toy.ema, "strong": functools.partial(toy.ema, lamb=9.0)}
    experiment = Experiment("tests.toy", toy.Toy(), methods, default="strong")
    for line, lamb in (("", 9.0), ("strong", 9.0), ("strong --lamb 1", 1.0), ("ema", 2.0), ("--lamb 3", 3.0)):
        (expected,) = product(toy.Toy(), toy.ema, lamb=lamb)
        assert parse(experiment, line.split())[0].key == expected.key


def test_a_hyperparameter_without_a_default_is_a_flag_that_is_needed(capsys):
    def needy(lr: LearningRate, lamb: Lamb = 2.0) -> Tx:
        return optax.chain(grokfast_ema(0.98, lamb), optax.adam(lr))

    experiment = Experiment("tests.toy", toy.Toy(), {"needy": needy}, default="needy")
    assert parse(experiment, ["needy", "--lr", "0.5"])[0].hyperparams == {"lr": 0.5, "lamb": 2.0}
    assert "--lr" in refused("needy", capsys, experiment)


@dataclasses.dataclass(frozen=True)
class Switched(toy.Toy):
    """A task with a switch."""

    centred: bool = False


def test_a_task_may_have_a_switch():
    experiment = dataclasses.replace(toy.EXPERIMENT, task=Switched())
    for flags, centred in (([], False), (["--centred"], True), (["--no-centred"], False)):
        assert parse(experiment, ["ema", *flags])[0].key["centred"] is centred


def test_hyperparameters_of_every_kind_are_flags():
    def kinds(
        lr: float = 0.1, b1: Static = 0.9, nesterov: bool = False, name: str = "a", size: int | None = None
    ) -> Tx:
        del name, size
        return optax.adam(lr, b1, nesterov=nesterov)

    experiment = Experiment("tests.toy", toy.Toy(), {"kinds": kinds}, default="kinds")
    run, _ = parse(experiment, ["kinds", "--lr", "1", "--b1", "0.5", "--nesterov", "--name", "b", "--size", "3"])
    assert run.hyperparams == {"lr": 1.0, "b1": 0.5, "nesterov": True, "name": "b", "size": 3}
    assert run.traced == {"lr": 1.0}


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("adam --lamb 2", ["Unrecognized", "--lamb", "toy ema --help", "in python -m tests.toy ma --help"]),
        ("ma --alpha 0.1", ["Unrecognized", "--alpha", "in python -m tests.toy ema --help"]),
        ("--window-size 3", ["Unrecognized", "--window-size", "in python -m tests.toy ma --help"]),
        ("--alpha 0.5 ma", ["Cannot select subcommand 'ma'", "'--alpha' belongs to the default subcommand 'ema'"]),
    ],
)
def test_a_flag_of_another_method_is_refused_and_the_method_that_has_it_named(line, parts, capsys):
    message = refused(line, capsys)
    assert all(part in message for part in parts)
    assert (" ma --help" in message) == any(part.endswith(" ma --help") for part in parts)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("adan", "the method must be one of ema, ma, adam, got 'adan'; did you mean adam?"),
        ("--seed 1 adan", "Unrecognized options: adan"),
        ("--lamb x", "--lamb"),
        ("--seed", "--seed"),
        ("--x 1", "--x"),
        ("--matmul-precision half", "--matmul-precision"),
    ],
)
def test_what_cannot_be_read_is_named(line, part, capsys):
    assert part in refused(line, capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--alpha 1", r"--alpha must be in \[0, 1\), got 1.0"),
        ("ma --window-size 0", "--window-size must be at least 1, got 0"),
        ("--lr -1", "--lr must be a finite number of at least 0, got -1.0"),
        ("--weight-decay -1", "--weight-decay must be a finite number of at least 0, got -1.0"),
        ("--lamb nan", "--lamb must be a finite number, got nan"),
        ("--max-steps 0", "--max-steps must be at least 1, got 0"),
        ("--hold-evals -1", "--hold-evals must be at least 0, got -1"),
        ("--stop-at 95", r"--stop-at must be in \(0, 1\], or None, got 95.0"),
        ("--seed -1", r"--seed must be in \[0, 2\*\*32\), got -1"),
        ("--batch-size 0", "--batch-size must be from 1 to 100,000,000, got 0"),
        ("--checkpoint-every 0", "--checkpoint-every must be at least 1, got 0"),
        ("--max-steps 2147483648", "--max-steps must be a whole number that int32 can hold, got 2147483648"),
        ("ma --window-size 2147483648", r"window_size \+ stride must be below 2\*\*31, got 2147483648"),
        ("--examples 100000001", "--examples must be from 1 to 100,000,000, got 100000001"),
        ("--devices 4", r"--devices must be a divisor of the batch size \(6\), got 4"),
        ("--measure x", r"--measure must be left out, for tests.toy has no measure, got x"),
    ],
)
def test_bad_values_make_no_folder(line, message, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=message):
        runner.train(toy.EXPERIMENT, *words(f"{line} --out {out}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        (Modular, "p", 10**18 + 9, "--p must be from 1 to 100,000,000, got 1000000000000000009"),  # a prime
        (Modular, "p", 46_349, "--p must be a prime number below 46,349, got 46349"),
        (Modular, "depth", 10**6, "--depth must be at most 1,000, got 1000000"),
        (Shakespeare, "layers", 10**6, "--layers must be at most 1,000, got 1000000"),
        (Shakespeare, "val_windows", 10**7, "--val-windows must be at most 100,000, got 10000000"),
    ],
)
def test_sizes_without_bound_are_refused_before_any_loop_or_array(task, field, value, message):
    with pytest.raises(UsageError, match=message):
        task(**{field: value})


def test_help_lists_the_methods_and_groups_the_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(toy.EXPERIMENT, ["--help"])
    text = capsys.readouterr().out
    assert "Logistic regression on points that a random plane divides" in text
    assert "Example: python -m tests.toy ema --seed 1 --out runs/my-run" in text
    assert "• ma The MA before Adam." in " ".join(text.split())
    groups = [text.index(f"{name} options") for name in ("task", "run", "training")]
    assert groups == sorted(groups)
    with pytest.raises(SystemExit, match="0"):
        main(toy.EXPERIMENT, ["ma", "--help"])
    text = capsys.readouterr().out
    assert "--window-size INT" in text
    assert "--alpha" not in text


@pytest.fixture
def folder(tmp_path):
    """A run folder that holds nothing but the configuration of a run."""
    experiment = dataclasses.replace(toy.EXPERIMENT, measures={"some": None})  # type: ignore
    run, options = parse(experiment, ["ma", "--seed", "3", "--window-size", "5", "--measure", "some"])
    options = dataclasses.replace(options, out=tmp_path / "run", checkpoint_every=7)
    return runner.open_folder(experiment, run, options, "data", resume=False)[0].path


def test_a_folder_holds_its_run(folder):
    experiment, run, options = stored(folder)
    assert experiment is toy.EXPERIMENT
    assert run == Run(toy.Toy(), toy.ma, hyperparams(toy.ma, window_size=5), seed=3, max_steps=80)
    assert options == Options(out=folder, measure="some", checkpoint_every=7)
    assert RunFolder(folder).config["data"] == "data"


def test_resume_changes_the_rule_and_where_it_runs_but_nothing_else(folder, capsys):
    flags = ["--max-steps", "160", "--stop-at", "0.5", "--hold-evals", "2", "--devices", "3"]
    (_, before, options), (_, after, new_options) = stored(folder), resume.parse([str(folder), *flags])
    assert after == dataclasses.replace(before, max_steps=160, stop_at=0.5, hold_evals=2)
    assert new_options == dataclasses.replace(options, devices=3)
    assert resume.parse([str(folder)])[1:] == (before, options)
    with pytest.raises(UsageError, match=r"--data-dir has no effect, because tests\.toy reads no files; leave it out"):
        resume.parse([str(folder), "--data-dir", "."])
    for flags in (["--lamb", "3"], ["--seed", "1"], ["--out", "x"], ["ma"]):
        with pytest.raises(SystemExit, match="2"):
            resume.parse([str(folder), *flags])
        assert flags[0] in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"nowhere is not a run folder \(it has no config.json\); name one, or"):
        resume.parse(["nowhere"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_size": [5]}, r"--window-size must be a whole number, got \[5\]"),
        ({"lamb": "x"}, "--lamb must be a number, got x"),
        ({"lr": -1.0}, "--lr must be a finite number of at least 0, got -1.0"),
        ({"method": "mb"}, r"the method must be one of .*, got 'mb'"),
        ({"method": 3}, "the method must be one of .*, got 3"),
        ({"experiment": "nowhere"}, "the experiment must be one of .*, got 'nowhere'"),
        ({"experiment": 3}, "."),
        ({"experiment": ...}, "no 'experiment'"),
        ({"lamb": ...}, "no 'lamb'"),
        ({"max_steps": ...}, "no 'max_steps'"),
    ],
)
def test_a_configuration_of_another_kind_is_named_with_its_cure(changes, reason, folder):
    config = {name: value for name, value in (RunFolder(folder).config | changes).items() if value is not ...}
    (folder / "config.json").write_text(to_json(config))
    message = rf"config\.json describes no run that can be continued here \({reason}.*\); put it back from a copy, or"
    with pytest.raises(UserError, match=message):
        stored(folder)


def test_the_list_of_experiments_takes_no_argument(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples", "modular"])
    with pytest.raises(UsageError, match=r"got 'modular'; did you mean python -m examples.modular\?"):
        importlib.import_module("examples.__main__").main()


def test_an_experiment_is_a_name_or_an_importable_module(tmp_path):
    assert find_experiment("modular").name == "modular"
    assert find_experiment("tests.toy") is toy.EXPERIMENT
    for name in ("foo", "json", "tests.nothing", "", "..modular"):
        message = rf"must be one of imdb, .*, or an importable module .* got '{re.escape(name)}'"
        with pytest.raises(UsageError, match=message):
            find_experiment(name)
    with pytest.raises(UsageError, match=r"got 'modula' .*; did you mean modular\?"):
        find_experiment("modula")
    lost = dataclasses.replace(toy.EXPERIMENT, name="toy")  # a run of it could not be continued
    with pytest.raises(UsageError, match="got 'toy'"):
        runner.train(lost, *words(f"--out {tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("what to do"), 1, "error: what to do"),
        (UsageError("how to"), 2, "error: how to"),
        (RunInterruptedError("interrupted after step 3"), 130, "interrupted after step 3"),
        (KeyboardInterrupt(), 130, "interrupted; what was complete is kept"),
        (
            OSError(28, "No space left on device", "x.csv"),
            1,
            "error: x.csv: No space left on device; free space there",
        ),
        (IsADirectoryError(21, "Is a directory", "x"), 1, "error: x: Is a directory; choose another path"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes."),
            1,
            "error: RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes; choose a smaller batch, model, data set "
            "or window",
        ),
        (MemoryError(), 1, "error: out of memory; choose a smaller batch, model, data set or window"),
    ],
)
def test_an_error_that_the_user_can_cure_is_a_message_and_a_status(error, status, message, capsys):
    def fail():
        raise error

    assert plain_errors(fail) == status
    assert capsys.readouterr().err == f"{message}\n"


def test_a_defect_keeps_its_traceback_unless_jax_has_no_device(monkeypatch, capsys):
    assert plain_errors(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        plain_errors(lambda: 1 / 0)

    def no_device():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", no_device)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert plain_errors(lambda: 1 / 0) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: JAX has no device (Unable to initialize backend 'cuda'); change the environment")
    assert "JAX_PLATFORMS=cuda" in message


STUBS = {
    "missing": "raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')",
    "interrupted": "import os\ntry: os.kill(os.getpid(), 2); os.urandom(9)\nexcept BaseException: pass",  # swallowed
}
RUN = "-m tests.toy --max-steps 4 --out {0}/run"
ENVIRONMENTS = ["JAX_ENABLE_X64=1", "JAX_NUMPY_RANK_PROMOTION=raise", "JAX_DEBUG_NANS=1", "PYTHONOPTIMIZE=2"]


@pytest.mark.parametrize(
    ("environment", "command", "status", "message"),
    [
        ("PYTHONPATH={0}/missing", "-m examples", 1, "error: No module named 'tyro'; pip install -e '.[examples]', or"),
        ("PYTHONPATH={0}/interrupted", "-m examples", 130, "interrupted; what was complete is kept"),
        ("JAX_NUM_CPU_DEVICES=abc", "-m examples", 1, '"abc" for JAX flag jax_num_cpu_devices; change or unset that'),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("JAX_PLATFORMS=cuda", RUN, 1, "error: JAX has no device ("),
                ("MPLBACKEND=unknown", RUN, 0, "The best validation accuracy"),
                ("LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "-m examples", 0, "python -m examples.qm9"),
                ("PYTHONIOENCODING=ascii", "-m examples.parity --help", 0, "--lamb"),
                ("A=b", "examples/parity.py --lr -1", 2, "error: --lr must be a finite number of at least 0, got -1"),
                ("A=b", RUN + " >/dev/full", 1, "error: No space left on device; free space there"),
                ("A=b", RUN + " 2>/dev/full", 0, "The best validation accuracy"),
                ("A=b", RUN + " 2>&-", 0, "The best validation accuracy"),
                ("A=b", RUN + " >&-", 0, "100%"),
                ("JAX_DEBUG_NANS=1", RUN + " --lr 3e38", 1, "the loss is no longer finite at step 2;"),
                ("PYTHONOPTIMIZE=2", "-m examples", 0, "python -m examples.qm9"),
                *((environment, RUN, 0, "The best validation accuracy") for environment in ENVIRONMENTS),
            ]
        ),
    ],
)
def test_a_command_in_a_hostile_environment(environment, command, status, message, tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tyro.py").write_text(text)
    line = f"{environment} {sys.executable} {command}".format(tmp_path)
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert (done.returncode, message in printed, "Traceback" in printed) == (status, True, False), printed


@pytest.mark.slow
def test_a_full_disk_ends_in_one_message(tmp_path):
    limited = f"ulimit -f 2; trap '' XFSZ; {sys.executable} {RUN} --checkpoint-every 1 --max-steps 8".format(tmp_path)
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not be written (File too large" in done.stderr
    assert "; what was there before is kept. Free space and continue with" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "out", "error"),
    [
        ("-m tests.toy --lr -1; echo $?", "2\n", "error: --lr must be a finite number of at least 0, got -1.0\n"),
        pytest.param(  # a closed pipe ends the command silently
            "-m tests.toy --help | head -1",
            "usage: python -m tests.toy [-h] [OPTIONS] [{ema,ma,adam}]\n",
            "",
            marks=pytest.mark.slow,
        ),
        pytest.param("-m examples.resume nowhere >/dev/null 2>&1; echo $?", "2\n", "", marks=pytest.mark.slow),
    ],
)
def test_the_command_of_a_shell(command, out, error):
    line = ["bash", "-c", f"{sys.executable} {command}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (out, error)
