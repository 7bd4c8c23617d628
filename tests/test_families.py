"""``docs/models.md`` ticks what this run proved, for every architecture that can be loaded."""

import pytest

from filmstrip.formats.registry import refused_architectures
from filmstrip.models.registry import supported_architectures
from tests.families import BEGIN, DOCUMENT, END, FAMILIES, Outcomes, proven, table


@pytest.fixture
def outcomes(request):
    """What the tests before this one did; the last file to run, if the whole suite runs (see conftest.py)."""
    return request.config.pluginmanager.get_plugin("filmstrip-outcomes").passed


def test_every_architecture_has_a_row():
    named = [name for family in FAMILIES if family.proofs for name in family.architectures]
    assert sorted(named) == supported_architectures()


def test_what_is_refused_by_name_has_an_open_row():
    named = [name for family in FAMILIES if not family.proofs for name in family.architectures]
    assert sorted(named) == refused_architectures()


def test_the_table_is_what_the_tests_prove(outcomes):
    files = {proof.split("::")[0] for family in FAMILIES for tests in family.proofs.values() for proof in tests}
    if missing := files - {test.split("::")[0] for test in outcomes}:
        pytest.skip(f"these did not run: {', '.join(sorted(missing))}")
    shown = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == table(outcomes), "run python -m tests.families"


def test_a_tick_needs_tests_that_ran_and_passed():
    proofs = ("a.py::test_x[one", "a.py::test_y[one")
    passed = {"a.py::test_x[one-1]": True, "a.py::test_x[one-2]": True, "a.py::test_x[two]": False}
    assert not proven(proofs, passed)
    assert proven(proofs, passed | {"a.py::test_y[one]": True})
    assert not proven(proofs, passed | {"a.py::test_y[one]": True, "a.py::test_x[one-2]": False})


def test_outcomes_of_skipped_and_broken_tests(pytester_like_reports):
    outcomes = Outcomes()
    for report in pytester_like_reports:
        outcomes.pytest_runtest_logreport(report)
    assert outcomes.passed == {
        "passed": True,
        "failed": False,
        "broken before": False,
        "broken after": False,
        "skipped": False,
    }


@pytest.fixture
def pytester_like_reports():
    """Reports as pytest makes them: of each phase of a test."""
    phases = {
        "passed": ("passed", "passed", "passed"),
        "failed": ("passed", "failed", "passed"),
        "broken before": ("failed", None, "passed"),
        "broken after": ("passed", "passed", "failed"),
        "skipped": ("passed", "skipped", "passed"),
    }
    return [
        pytest.TestReport(name, ("a.py", 1, name), {}, outcome, None, when)
        for name, outcomes in phases.items()
        for when, outcome in zip(("setup", "call", "teardown"), outcomes, strict=True)
        if outcome is not None
    ]
