"""A short soak, and that a long one would tell of what goes wrong."""

import pytest
import tqdm

from .long import soak

ARGUMENTS = soak.Arguments(updates=4_000, chunk=1_000)


def run(name):
    with tqdm.tqdm(disable=True) as bar:
        return soak.soak(name, ARGUMENTS, bar)


SLOW = ["moving_average stride", "lfilter from the gradient"]


@pytest.mark.parametrize("name", ["amplify late", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_thousands_of_updates_leave_no_fault(name, lenient):
    figures = run(name)
    assert soak.faults(figures) == []
    assert figures["non_finite_updates"] > 10


def test_a_filter_that_is_off_by_one_in_a_thousand_is_told(lenient, monkeypatch):
    case = soak.CASES["ema"]
    monkeypatch.setitem(soak.CASES, "ema", case._replace(reference=lambda: soak.Ema(0.98 * 1.001)))
    found = " ".join(soak.faults(run("ema")))
    assert "in float32" in found
    assert "in complex64" in found


def test_every_fault_is_told():
    good = {
        "largest_error": dict.fromkeys(soak.DTYPES, 0.0),
        "non_finite_updates": 5,
        "non_finite_updates_counted": 5,
        "compilations_after_the_first_chunk": 0,
        "live_arrays": [20, 20],
        "resident_growth_mib": 0.0,
    }
    assert soak.faults(good) == []
    for change in (
        {"largest_error": {"float32": float("nan")}},
        {"non_finite_updates_counted": 4},
        {"compilations_after_the_first_chunk": 1},
        {"live_arrays": [20, 21]},
        {"resident_growth_mib": 100.0},
    ):
        assert len(soak.faults(good | change)) == 1
