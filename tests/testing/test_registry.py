"""Faults are found by walking their folder, and there is one for each cause."""

import importlib
import inspect

import pytest

import lightning_spike.testing
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.testing import DECOYS, FAULTS, UNCOVERED, faults_for, registry

CAUSES = [cause.id for cause in catalogue()]


def test_every_cause_has_a_fault_and_every_fault_one_of_the_causes():
    assert {kind.cause for kind in FAULTS} == set(CAUSES)
    assert all(faults_for(cause) for cause in CAUSES)
    assert faults_for("nothing") == ()


def test_decoys_and_uncovered_faults_have_no_cause():
    assert len(UNCOVERED) >= 3
    assert {kind.cause for kind in (*DECOYS, *UNCOVERED)} == {None}
    assert not set(FAULTS) & {*DECOYS, *UNCOVERED}


@pytest.mark.parametrize("kind", [*FAULTS, *DECOYS, *UNCOVERED])
def test_each_can_be_imported_from_the_package_and_says_what_it_is(kind):
    assert getattr(lightning_spike.testing, kind.__name__) is kind
    assert kind.__name__ in lightning_spike.testing.__all__
    options = [p.name for p in inspect.signature(kind).parameters.values()]
    assert options[:2] == ["at", "strength"]
    for name in options:
        assert f"{name}: " in inspect.getdoc(kind), "every option is explained"
    assert kind.SCALE.means
    assert set(kind.MILD) | set(kind.STRONG) <= set(options)


def test_a_new_fault_is_a_new_file(tmp_path, monkeypatch):
    source = (
        "from lightning_spike.testing.fault import OneOffFault, Scale\n"
        "class Gremlin(OneOffFault):\n"
        "    cause = 'code_bug'\n"
        "    SCALE = Scale(means='how many', above=0)\n"
        "    MILD = STRONG = {'strength': 1.0}\n"
    )
    (tmp_path / "gremlin.py").write_text(source)
    package = importlib.import_module("lightning_spike.testing.faults")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    found = {kind.__name__ for kind in registry._found()}
    assert found == {kind.__name__ for kind in (*FAULTS, *DECOYS, *UNCOVERED)} | {"Gremlin"}
