"""What is trained: the methods, the grids they are tuned on, and the parts of the study."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from examples.harness.config import Config
from examples.harness.errors import UsageError, UserError, require
from examples.harness.optimizers import NAMES, Filtering
from examples.modular import EXPERIMENT

from .cells import BASE, differences

METHODS = EXPERIMENT.presets  # names here and in all tables and pictures
MAIN = ("adam-0.005", "adamw-1", "ema", "ma")
# On other tasks, too: the fair control of both filters, and what is recommended.
ELSEWHERE = ("adam-0.00167", *MAIN, "ma+adamw-1")
# With small embeddings the stronger coupled decay is the better one, so that of `ma`, too, stands beside it.
OTHER_STARTS = ("adam-0.01", *ELSEWHERE)

THRESHOLD = 0.95  # validation accuracy
AFTER = 50  # evaluations for which a run is followed after its first at the threshold, to see whether it holds it
TUNING = {"tuning": 1000, "finals": 1001}  # seeds that are not reported, nor followed after the threshold
TUNING_SEEDS = tuple(TUNING.values())
TUNING_CAP = 2_500  # steps of a tuning run at most: a pair that needs more is not the one to choose
FINALISTS = 3  # pairs of each method, its fastest in `tuning`, that are run with the other seed, too


class Variant(NamedTuple):
    """A method, and what is changed of its configuration."""

    method: str
    changes: dict[str, Any]

    def run(self, seed: int, cap: int) -> Config:
        """The configuration of one run, of `cap` steps at most."""
        budget = min(cap, TUNING_CAP) if seed in TUNING_SEEDS else cap
        run = {"seed": seed, "budget": budget, "stop_at": THRESHOLD}
        return METHODS[self.method].config.replace(**self.changes | run)

    @property
    def name(self) -> str:
        """The method's name, without its weight decay where that may be another."""
        return without_decay(self.method) if "weight_decay" in self.changes else self.method

    @property
    def in_words(self) -> str:
        """Filter, optimizer and decay, as a picture names them."""
        f, o = self.run(BASE["seed"], BASE["budget"]).hyper
        decay = f"decay {o.weight_decay:g}" if o.weight_decay else "no decay"
        if f.filter == "none":
            return f"{NAMES[o.optimizer]}, {decay}"
        words = ["debiased" * (f.start == "debiased"), "normalized" * f.normalize, "slow part of the" * (f.fast == 0)]
        words += [f.filter.upper(), f"(α {f.alpha:g})" * (f.filter == "ema" and f.alpha != BASE["alpha"])]
        words += [f"from step {f.filter_from}" * (f.filter_from > 0)]
        return f"{' '.join(word for word in words if word)} + {NAMES[o.optimizer]}, {decay}"


def without_decay(method: str) -> str:
    """A method's name without its weight decay."""
    return method.removesuffix(f"-{METHODS[method].config.optimization.weight_decay:g}")


def method_of(cell: Mapping[str, Any]) -> str:
    """The name of the method that a cell is a run of."""
    settings = lambda changes: {k: v for k, v in changes.items() if k not in ("seed", "budget", "stop_at")}
    names = [name for name, one in METHODS.items() if settings(differences(one.config)) == settings(cell)]
    if not names:
        raise UserError(f"no method is configured as {settings(cell)} any more; delete its results")
    return names[0]


def check_among(flag: str, values: Sequence[str], known: Iterable[str]) -> None:
    """Raise unless there are values, all of them known."""
    known = list(known)
    if not values or not set(values) <= set(known):
        separator = "; " if any("," in name for name in known) else ", "
        raise UsageError(f"{flag} must be among {separator.join(known)}, got {separator.join(values) or 'none'}")


def check_flags(methods: Sequence[str], **numbers: int) -> None:
    """Validate what --methods names, and flags that are numbers of at least 1."""
    check_among("--methods", methods, METHODS)
    for name, value in numbers.items():
        require(value >= 1, name, "at least 1", value)


Pair = tuple[Variant, Variant]  # what is compared, and with what


def grid(methods: Iterable[str], **changes: Sequence[Any]) -> list[Variant]:
    """All combinations of methods and changed values."""
    return [
        Variant(name, dict(zip(changes, values, strict=True)))
        for name in methods
        for values in itertools.product(*changes.values())
    ]


# What each method's learning rate and weight decay are chosen from: nine pairs each. At one rate Lion steps further
# than Adam and Muon less far, so their grids lie elsewhere; rate times decoupled decay spans 3e-4 to 3e-2 in all.
Grid = tuple[tuple[float, ...], tuple[float, ...]]
COUPLED: Grid = ((1e-3, 3e-3, 1e-2), (0.0003, 0.001, 0.003))
AMPLIFIED: Grid = (COUPLED[0], (0.001, 0.003, 0.01))  # the filters weaken a coupled decay; see `adam-0.00167`
DECOUPLED: Grid = ((1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0))
LION: Grid = ((3e-4, 1e-3, 3e-3), (1.0, 3.0, 10.0))
MUON: Grid = ((1e-2, 3e-2, 1e-1), (0.03, 0.1, 0.3))
TUNED = {
    "adam-0.005": COUPLED,
    "ema": AMPLIFIED,
    "ema-0.95": AMPLIFIED,
    "ema-normalized": COUPLED,  # divided by 1 + λ, so its decay is not weakened
    "ma": AMPLIFIED,
    "two-stage": AMPLIFIED,
    "slow-only": AMPLIFIED,
    "adamw-1": DECOUPLED,
    "nadamw-1": DECOUPLED,
    "lion-1": LION,
    "ademamix-1": DECOUPLED,
    "muon-1": MUON,
    "ema+adamw-1": DECOUPLED,
    "ema-late+adamw-1": DECOUPLED,
    "ma+adamw-1": DECOUPLED,
    "ema+muon-1": MUON,
    "ma+muon-1": MUON,
}

PARTS: dict[str, list[Variant]] = {
    "methods": grid(METHODS),
    "operations": grid(ELSEWHERE, operation=("addition", "subtraction", "division")),
    "start": grid(OTHER_STARTS, embedding_std=(1.0, 0.02), train_fraction=(0.5, 0.3)),
    # The paper's ablations: its Figures 4 (there without decay), 7 and 8
    "lamb": grid(["ema"], lamb=(0.0, 0.5, 1.0, 2.0, 5.0, 10.0)),
    "alpha": grid(["ema"], alpha=(0.8, 0.9, 0.95, 0.98, 0.99, 0.995)),
    "decay": grid(["adam-0.005", "ema", "ma"], weight_decay=(0.0, 0.001, 0.002, 0.005, 0.01, 0.02)),
    "window": grid(["ma"], window_size=(2, 10, 50, 100, 200), lamb=(1.0, 2.0, 5.0, 10.0)),
    # What makes the EMA another filter than the MA: what its average holds at first, that it amplifies from the first
    # step on, where the MA waits until its window is full, or its smaller λ?
    "early": [
        *grid(["ema", "ema+adamw-1"], start=("gradient", "zero", "debiased")),
        *grid(["ema+adamw-0.1"], start=("gradient", "debiased")),
        *grid(["ema", "ema+adamw-1"], filter_from=(100,)),
        *grid(["ema+adamw-1"], lamb=(5.0,), start=("gradient", "debiased")),
        *grid(["ema-late+adamw-1"]),
        *grid(["ma+adamw-1"], lamb=(2.0, 5.0)),
    ],
    # As the paper has them in its Table 1 and Figure 6: without weight decay, the slow part alone after fitting
    "paper": [
        *grid(["ma", "two-stage", "slow-only"], weight_decay=(0.0,)),
        *grid(["slow-only"], weight_decay=(0.0,), filter_from=(500,)),
    ],
    # The README's first snippet, as it was and as it is, each with its control; without a warm-up of the learning rate
    "snippet": [
        *grid(["ema+adamw-1", "adamw-1"], weight_decay=(1e-4,), beta2=(0.999,), lr_warmup=(0,)),
        *grid(["ma+adamw-1", "ema-late+adamw-1", "adamw-1"], lr_warmup=(0,)),
        *grid(["ema+adamw-1"], start=("debiased",), lr_warmup=(0,)),
    ],
    # Without decay nothing but the filter differs. What it amplifies it also makes go faster, hence the higher rates.
    "undecayed": [*grid(["adam"], lr=(0.001, 0.003, 0.006)), *grid(["ema+adam", "ema-late+adam", "ma+adam"])],
    # At every rate and decay that is best for one of these, the others, too
    "rate": grid(["adamw-1", "ema-late+adamw-1", "ma+adamw-1"], lr=(0.001, 0.003), weight_decay=(1.0, 3.0)),
    # Behind the MA a rate of 0.003 is stable with λ 3, and with the published λ it is not
    "stable": grid(["ma+adamw-1"], lr=(0.003,), weight_decay=(1.0, 3.0), lamb=(3.0, 5.0)),
    "tuning": [
        variant for name, (rates, decays) in TUNED.items() for variant in grid([name], lr=rates, weight_decay=decays)
    ],
}


def pairs(part: str) -> list[Pair]:
    """Each variant of a part, and its controls with the same changes but for those of the filter."""
    found = {}
    for variant in PARTS[part]:
        changes = {name: value for name, value in variant.changes.items() if name not in _FILTERING}
        for method in METHODS[variant.method].controls:
            control = Variant(method, changes)
            # With the same changes two controls may be one.
            found.setdefault((variant.run(0, 1), control.run(0, 1)), (variant, control))
    return list(found.values())


def tuned_pairs() -> list[tuple[str, str]]:
    """Each tuned method with a filter, and its tuned controls; their rates and decays may be any."""
    tuned_form = {without_decay(name): name for name in TUNED}
    return [
        (name, tuned_form[control])
        for name in TUNED
        for control in dict.fromkeys(map(without_decay, METHODS[name].controls))
    ]


_FILTERING = {field.name for field in dataclasses.fields(Filtering)}
TWO_STAGES: Pair = (Variant("two-stage", {"weight_decay": 0.0}), Variant("ma", {"weight_decay": 0.0}))
FIRST_STEPS: list[Pair] = [  # pairs that tell what the EMA's first steps do
    (Variant(one, changes), Variant(other, {}))
    for one, other, changes in (
        ("ema", "adam-0.00167", {"start": "debiased"}),
        ("ema", "ema", {"start": "debiased"}),
        ("ema+adamw-1", "ema+adamw-1", {"start": "debiased"}),
        ("ema+adamw-1", "adamw-1", {"start": "debiased"}),
        ("ema+adamw-1", "adamw-1", {"filter_from": 100}),
        ("ema+adamw-1", "adamw-1", {"start": "debiased", "lamb": 5.0}),
        ("ema+adamw-0.1", "adamw-0.1", {"start": "debiased"}),
    )
]
