"""The command line of an experiment."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .config import Config, Experiment
from .errors import UsageError, plain_errors
from .optimizers import Filtering, describe
from .run_folder import read_config
from .runner import MAY_CHANGE, Output, train

# Flags without effect, and what gives them one, by the filter that is chosen.
WITHOUT_EFFECT = {
    "none": ([field.name for field in dataclasses.fields(Filtering)][1:], "--filter ema or --filter ma"),
    "ema": (["window_size", "stride", "buffer_dtype"], "--filter ma"),
    "ma": (["alpha", "start"], "--filter ema"),
}


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run an experiment as a command line says; the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return plain_errors(lambda: train(experiment, *parse(experiment, words)))


def parse(experiment: Experiment, argv: Sequence[str]) -> tuple[Config, Output]:
    """The configuration and the output options of a command line.

    The defaults of the flags are those of the preset, or of the run that is resumed; so both are looked up first.
    """
    early = dataclasses.make_dataclass("early", [("preset", str | None, None), ("resume", Path | None, None)])
    choice, _ = tyro.cli(early, args=argv, return_unknown_args=True, add_help=False)
    name = choice.preset or experiment.default
    base, stored = experiment.preset(name), {}
    if choice.resume is not None:
        if choice.preset is not None:
            raise UsageError("--preset starts a run and --resume continues one; pass one of them")
        stored = stored_flags(experiment, choice.resume)
        base = base.replace(**stored)
    kind = Literal[tuple(experiment.presets)]
    preset = Annotated[kind, tyro.conf.arg(help="Configuration that the other flags start from; see above.")]
    parts = {part.name: getattr(base, part.name) for part in dataclasses.fields(base)}
    fields = [("preset", preset, name), *((key, type(part), part) for key, part in parts.items())]
    output = Output
    if experiment.measures:
        named = Annotated[
            Literal[(None, *experiment.measures)],
            tyro.conf.arg(help="Measure this too, into metrics.csv and a picture of its name."),
        ]
        output = dataclasses.make_dataclass("Output", [("measure", named, None)], bases=(Output,), frozen=True)
    parsed = tyro.cli(
        dataclasses.make_dataclass("command", [*fields, ("output", output, output())]),
        prog=f"python -m examples.{experiment.name}",
        description=about(experiment),
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config = Config(**{key: getattr(parsed, key) for key in parts})
    for key, value in stored.items():
        if config.flat()[key] != value and key not in MAY_CHANGE:
            raise UsageError(
                f"{flag(key)} is {value} in the run in {choice.resume} and must stay so, got {config.flat()[key]}; "
                "start a new run for it"
            )
    check_effect(config, base, name)
    return config, parsed.output


def stored_flags(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The flags that the run in a folder was started with."""
    everything = read_config(folder)
    if everything["experiment"] != experiment.name:
        raise UsageError(
            f"{folder} holds a run of {everything['experiment']}; continue it by "
            f"python -m examples.{everything['experiment']} --resume {folder}"
        )
    stored = {name: value for name, value in everything.items() if name in experiment.base.flat()}
    if stored.get("data_dir") is not None:
        stored["data_dir"] = Path(stored["data_dir"])
    return stored


def check_effect(config: Config, base: Config, preset: str) -> None:
    """Raise if a flag that was changed has no effect; say which numbers a changed filter keeps."""
    filtering, before, now = config.filtering, base.flat(), config.flat()
    names, cure = WITHOUT_EFFECT[filtering.filter]
    if idle := [flag(name) for name in names if now[name] != before[name]]:
        have, it = ("has", "it") if len(idle) == 1 else ("have", "them")
        raise UsageError(
            f"{', '.join(idle)} {have} no effect with --filter {filtering.filter}; leave {it} out, or choose {cure}"
        )
    if not filtering.filter_from and not filtering.collect:
        raise UsageError("--no-collect has no effect without --filter-from; leave it out")
    kept = all(now[name] == before[name] for name in ("lamb", "weight_decay"))
    if kept and filtering.filter not in (base.filtering.filter, "none"):
        print(
            f"note: --filter {filtering.filter} keeps --lamb {now['lamb']:g} and --weight-decay "
            f"{now['weight_decay']:g} of the preset {preset}",
            file=sys.stderr,
        )


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def about(experiment: Experiment) -> str:
    """The description that --help begins with: an example, and what each preset is."""
    presets = experiment.presets
    width = max(map(len, presets))
    in_words = lambda preset: f"{preset.about}: " * bool(preset.about) + describe(*preset.config.hyper)
    example = next((name for name in presets if name != experiment.default), experiment.default)
    lines = [
        (type(experiment.base.task).__doc__ or "").split("\n\n")[0],
        f"\nExample: python -m examples.{experiment.name} --preset {example} --seed 1 --out runs/my-run",
        f"\nPresets ({experiment.default} is the default):",
    ]
    return "\n".join(lines + [f"  {name:<{width}}  {in_words(preset)}" for name, preset in presets.items()])
