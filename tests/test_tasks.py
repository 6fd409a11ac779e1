"""What holds of every experiment: its presets and their controls, its data without a network."""

import json

import pytest
import requests

from examples import imdb, mnist, qm9, shakespeare
from examples.harness import downloads
from examples.harness.config import Experiment, find_experiment, task_names
from examples.harness.errors import UserError
from examples.harness.optimizers import describe


@pytest.mark.parametrize("task", task_names())
def test_a_preset_with_a_filter_has_controls_without(task):
    experiment = find_experiment(task)
    assert isinstance(experiment, Experiment)
    assert experiment.name == task
    assert experiment.base == experiment.preset(experiment.default)
    assert json.loads(json.dumps(experiment.base.facts()))["seed"] == 0
    for preset in experiment.presets.values():
        filtering, optimization = preset.config.hyper
        assert describe(filtering, optimization)
        assert bool(preset.controls) == (filtering.filter != "none")
        for control in map(experiment.preset, preset.controls):
            assert control.filtering.filter == "none"
            assert (control.task, control.optimization.lr) == (preset.config.task, optimization.lr)


@pytest.mark.parametrize(
    ("task", "decays", "alpha", "lamb", "others"),
    [
        ("mnist", (0.01, 2.0), 0.8, 0.1, {"lr": 1e-3, "budget": 100_000, "batch_size": 200, "init_scale": 8}),
        (
            "imdb",
            (1.0, 10.0),
            0.98,
            2.0,
            {"lr": 3e-4, "budget": 10_000, "batch_size": 50, "clip_norm": 5, "init_scale": 6},
        ),
        ("qm9", (0.0, 0.01), 0.9, 1.0, {"lr": 1e-3, "budget": 100_000, "batch_size": 32, "init_scale": 3}),
    ],
)
def test_presets_are_filter_and_decay_two_by_two(task, decays, alpha, lamb, others):
    expected = {"alpha": alpha, "lamb": lamb, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "lr_warmup": 0}
    expected |= {"clip_norm": None, "stop_at": None, "start": "gradient", "filter_from": 0, **others}
    presets = find_experiment(task).presets
    assert {name: preset.controls for name, preset in presets.items()} == {
        "baseline": (),
        "filter-only": ("baseline",),
        "decay-only": (),
        "paper": ("decay-only",),
    }
    for name, (config, _, _) in presets.items():
        facts = config.flat()
        assert facts["filter"] == ("ema" if name in ("filter-only", "paper") else "none")
        assert facts["weight_decay"] == decays[name in ("decay-only", "paper")]
        assert {key: facts[key] for key in expected} == expected


@pytest.mark.parametrize("module", [mnist, imdb, qm9, shakespeare])
def test_without_a_network_it_says_what_to_do(module, monkeypatch):
    asked = []

    def fail(url, known_hash, fname, path):
        asked.append((url, known_hash))
        raise requests.ConnectionError("a long story")

    monkeypatch.setattr(downloads.pooch, "retrieve", fail)
    files = getattr(module, "FILES", None) or {imdb.ARCHIVE: imdb.MD5}
    name, digest = next(iter(files.items()))
    with pytest.raises(UserError, match=rf"(?s)could not download {name}.*no connection.*--data-dir FOLDER"):
        module.load(None)
    sources = getattr(module, "SOURCES", (imdb.SOURCE,))
    assert asked == [(source + name, digest) for source in sources]
    assert len(digest or "") in (0, 4 + 32, 64)
