"""The command line of an experiment."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .config import Config, Experiment
from .errors import UsageError, plain_errors
from .optimizers import Filtering, describe
from .run_folder import read_config
from .runner import MAY_CHANGE, Output, train

# Flags without effect, by the filter that is chosen.
OF_EMA = ("alpha", "start")
OF_MA = ("window_size", "stride", "buffer_dtype")
OF_ANY = tuple(field.name for field in dataclasses.fields(Filtering) if field.name not in ("filter", *OF_EMA, *OF_MA))
WITHOUT_EFFECT = {"none": (*OF_EMA, *OF_MA, *OF_ANY), "ema": OF_MA, "ma": OF_EMA}


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Run an experiment as a command line says; the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return plain_errors(lambda: train(experiment, *parse(experiment, words)))


def parse(experiment: Experiment, argv: Sequence[str]) -> tuple[Config, Output]:
    """The configuration and the output options of a command line.

    The defaults of the flags are those of the preset, or of the run that is resumed; so both are looked up first.
    """
    presets = Literal[tuple(experiment.presets)]
    preset = Annotated[presets, tyro.conf.arg(help="Configuration that the other flags start from; see above.")]
    early = dataclasses.make_dataclass("early", [("preset", str | None, None), ("resume", Path | None, None)])
    choice, _ = tyro.cli(early, args=argv, return_unknown_args=True, add_help=False)
    base, stored = experiment.preset(choice.preset or experiment.default), {}
    if choice.resume is not None:
        if choice.preset is not None:
            raise UsageError("--preset starts a run and --resume continues one; pass one of them")
        stored = stored_flags(experiment, choice.resume)
        base = base.replace(**stored)
    parts = {part.name: getattr(base, part.name) for part in dataclasses.fields(base)}
    command = dataclasses.make_dataclass(
        "command",
        [
            ("preset", preset, choice.preset or experiment.default),
            *((name, type(part)) for name, part in parts.items()),
            ("output", Output),
        ],
        kw_only=True,
    )
    parsed = tyro.cli(
        command,
        prog=f"python -m examples.{experiment.name}",
        description=about(experiment),
        args=argv,
        default=command(preset=choice.preset or experiment.default, output=Output(), **parts),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config = Config(**{name: getattr(parsed, name) for name in parts})
    for name, value in stored.items():
        if config.flat()[name] != value and name not in MAY_CHANGE:
            raise UsageError(
                f"{flag(name)} is {value} in the run in {choice.resume} and must stay so, got {config.flat()[name]}; "
                "start a new run for it"
            )
    check_effect(config, base, choice.preset or experiment.default)
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
    kind, before, now = config.filtering.filter, base.flat(), config.flat()
    idle = [name for name in WITHOUT_EFFECT[kind] if now[name] != before[name]]
    if not config.filtering.filter_from and not config.filtering.collect and "collect" not in idle:
        idle.append("collect")
    if idle:
        cure = {"none": "choose --filter ema or --filter ma", "ema": "choose --filter ma", "ma": "choose --filter ema"}
        reason = "without --filter-from" if idle == ["collect"] else f"with --filter {kind}"
        leave = f"leave {'it' if len(idle) == 1 else 'them'} out"
        raise UsageError(
            f"{', '.join(map(flag, idle))} has no effect {reason}; {leave}"
            + (f", or {cure[kind]}" if idle != ["collect"] else "")
        )
    if kind not in (base.filtering.filter, "none") and (now["lamb"], now["weight_decay"]) == (
        before["lamb"],
        before["weight_decay"],
    ):
        print(
            f"note: --filter {kind} keeps --lamb {now['lamb']:g} and --weight-decay {now['weight_decay']:g} of the "
            f"preset {preset}",
            file=sys.stderr,
        )


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def about(experiment: Experiment) -> str:
    """The description that --help begins with: an example, and what each preset is."""
    module = f"python -m examples.{experiment.name}"
    presets: Mapping[str, Any] = experiment.presets
    width = max(map(len, presets))
    in_words = lambda preset: f"{preset.about}: " * bool(preset.about) + describe(*preset.config.hyper)
    lines = [f"  {name:<{width}}  {in_words(preset)}" for name, preset in presets.items()]
    example = next((name for name in presets if name != experiment.default), experiment.default)
    return "\n".join(
        [
            (type(experiment.base.task).__doc__ or "").split("\n\n")[0],
            "",
            f"Example: {module} --preset {example} --seed 1 --out runs/my-run",
            "",
            f"Presets ({experiment.default} is the default):",
            *lines,
        ]
    )
