"""report.json against the contract, by a check that knows nothing of the code.

The schema is written down here a second time.
"""

import dataclasses
import json
import math
from types import MappingProxyType

import numpy as np
import pytest

from lightning_spike.errors import UnreadableReportError
from lightning_spike.records import Action, Moment
from lightning_spike.report.json_file import as_json, read_report, with_nonfinite, write_report

NUMBER = (int, float)
EVIDENCE = {"signal": str, "step": (int, None), "observed": (*NUMBER, None), "expected": (*NUMBER, None), "text": str}
CAUSE = {
    "cause": str,
    "family": {"data", "learning_rate", "gradient", "numerics", "optimizer", "environment", "generalization"},
    "probability": NUMBER,
    "episodes": [int],
    "confirmed": (bool, None),
    "summary": str,
    "evidence": [EVIDENCE],
    "fixes": [str],
    "change": (dict, None),
}
EPISODE = {
    "id": int,
    "kind": {"spike", "divergence", "nonfinite", "oscillation", "stall", "overfit"},
    "onset_step": int,
    "peak_step": int,
    "end_step": (int, None),
    "epoch": int,
    "batch_idx": int,
    "loss_before": (*NUMBER, None),
    "loss_peak": (*NUMBER, None),
    "causes": [CAUSE],
}
SCHEMA = {
    "schema_version": {1},
    "lightning_spike": str,
    "run": {
        "status": {"finished", "stopped_early", "exception", "interrupted"},
        "steps": int,
        "epochs": int,
        "seconds": NUMBER,
        "world_size": int,
        "precision": str,
        "started": str,
    },
    "episodes": [EPISODE],
    "causes": [CAUSE],
    "actions": [{"action": str, "step": int, "detail": dict}],
}


def check(value, schema, where="report"):
    """Every key of the schema is there and of its kind; further keys are allowed."""
    match schema:
        case dict():
            assert isinstance(value, dict), where
            for key, inner in schema.items():
                assert key in value, f"{where}.{key}"
                check(value[key], inner, f"{where}.{key}")
        case list():
            assert isinstance(value, list), where
            for i, item in enumerate(value):
                check(item, schema[0], f"{where}[{i}]")
        case set():
            assert value in schema, f"{where}: {value!r}"
        case tuple():
            kinds = tuple(type(None) if kind is None else kind for kind in schema)
            assert isinstance(value, kinds), f"{where}: {value!r}"
        case _:
            assert isinstance(value, schema), f"{where}: {value!r}"
            assert isinstance(value, bool) == (schema is bool), f"{where}: {value!r}"


def strictly(text):
    def refuse(constant):
        msg = f"{constant} is no JSON"
        raise AssertionError(msg)

    return json.loads(text, parse_constant=refuse)


def test_a_troubled_run_fits_the_contract(troubled, tmp_path):
    content = strictly(write_report(troubled, tmp_path / "report.json").read_text(encoding="utf-8"))
    check(content, SCHEMA)
    assert [e["onset_step"] for e in content["episodes"]] == [400, 800]
    assert content["episodes"][1]["end_step"] is None
    assert content["episodes"][1]["loss_peak"] is None
    assert [c["cause"] for c in content["causes"]] == ["lr_restart", "gradient_explosion", "bad_batch"]
    assert content["causes"][0]["evidence"][0]["expected"] == 0.001
    assert [c["cause"] for c in content["episodes"][1]["causes"]] == ["lr_restart", "gradient_explosion"]
    assert content["run"]["steps"] == 1200
    assert content["run"]["epochs"] == 4
    assert content["actions"][0]["detail"]["suspects"][1] == {
        "position": 2,
        "dataset_index": None,
        "loss": None,
        "max_abs": None,
    }


def test_a_healthy_run_has_no_episodes_and_no_causes(healthy, tmp_path):
    content = strictly(write_report(healthy, tmp_path / "report.json").read_text(encoding="utf-8"))
    check(content, SCHEMA)
    assert content["episodes"] == content["causes"] == content["actions"] == content["disabled"] == []


def test_what_was_written_is_read_back(troubled, tmp_path):
    assert read_report(write_report(troubled, tmp_path / "report.json")) == as_json(troubled)


def test_a_detail_may_hold_anything(troubled, tmp_path):
    class Strange:
        def __str__(self):
            return "strange"

    detail = {
        "array": np.array([1.0, math.inf]),
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "path": tmp_path,
        "tuple": (1, -math.inf),
        3: MappingProxyType({"nested": math.nan}),
        "object": Strange(),
        "surrogate": "caf\udce9",
        "huge": 10**30,
    }
    at = Moment(ordinal=0, step=7, epoch=0, batch_idx=0)
    object.__setattr__(troubled, "actions", (Action(action="dump", at=at, detail=detail),))
    content = strictly(write_report(troubled, tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["actions"][0] == {
        "action": "dump",
        "step": 7,
        "at": {"ordinal": 0, "step": 7, "epoch": 0, "batch_idx": 0},
        "detail": {
            "array": [1.0, None],
            "scalar": 0.5,
            "flag": True,
            "path": str(tmp_path),
            "tuple": [1, None],
            "3": {"nested": None},
            "object": "strange",
            "surrogate": "caf?",
            "huge": 10**30,
        },
    }
    assert content["nonfinite"] == {
        "/episodes/1/loss_peak": "NaN",
        "/actions/0/detail/array/1": "Infinity",
        "/actions/0/detail/tuple/1": "-Infinity",
        "/actions/0/detail/3/nested": "NaN",
    }


def test_a_pointer_bears_every_key(troubled):
    detail = {"grad_norm/a~b": math.inf, "": -math.inf, "~1": {"/": math.nan}}
    at = Moment(ordinal=0, step=7, epoch=0, batch_idx=0)
    content = as_json(dataclasses.replace(troubled, actions=(Action(action="dump", at=at, detail=detail),)))
    assert content["actions"][0]["detail"] == {"grad_norm/a~b": None, "": None, "~1": {"/": None}}
    assert "/actions/0/detail/grad_norm~1a~0b" in content["nonfinite"]  # as RFC 6901, section 3, escapes it
    assert repr(with_nonfinite(content)["actions"][0]["detail"]) == repr(detail)
    assert content["actions"][0]["detail"][""] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "schema_version 1, found None"),
        (b'{"schema_version": 2}', "schema_version 1, found 2"),
        (b'{"schema_version": 1, "run": {}}', "lacks episodes, causes, actions"),
    ],
)
def test_what_is_no_report_is_refused_with_a_reason(tmp_path, content, said):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(UnreadableReportError, match=said):
        read_report(path)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(UnreadableReportError, match="nowhere"):
        read_report(tmp_path / "nowhere.json")
