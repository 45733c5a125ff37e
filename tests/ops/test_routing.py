"""Which way the GPU goes: the table is what the model gives, forced ways are obeyed, unknown devices are served."""

import json

import pytest
import torch

from rsae_triton.commands import routes as measure_routes
from rsae_triton.common.errors import ConfigError
from rsae_triton.ops import backends, routing
from rsae_triton.ops.reference import GateSpec, GateTensors


def test_the_committed_table_is_that_of_the_model():
    """But for rows that were measured on a device."""
    committed = json.loads(routing.TABLE.read_text())["rows"]
    assert [row for row in committed if row["source"] == "predicted"] == [
        row for row, there in zip(routing.predicted(), committed, strict=True) if there["source"] == "predicted"
    ]
    assert {row["source"] for row in committed} <= {"predicted", "measured"}


def test_writing_keeps_what_was_measured(tmp_path):
    path = tmp_path / "routes.json"
    routing.write(path)
    table = json.loads(path.read_text())
    measured = {**table["rows"][7], "source": "measured", "forward": "split", "forward_split_ms": 0.5}
    table["rows"][7] = measured
    path.write_text(json.dumps(table))
    routing.write(path)
    rows = json.loads(path.read_text())["rows"]
    assert rows[7] == measured
    assert len(rows) == len(routing.predicted())


def test_fusion_is_for_narrow_models_and_inference():
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "something new"):
        wide = routing.route(name, 8192, 3, 2, True, 2, training=True)
        assert (wide.forward, wide.backward, wide.source) == ("split", "split", "predicted")
        assert routing.route(name, 8192, 3, 2, True, 2, training=False).forward == "fused"
    narrow = routing.route("NVIDIA H100 80GB HBM3", 576, 3, 2, True, 2, training=True)
    assert (narrow.forward, narrow.backward) == ("fused", "split")


def test_a_way_can_be_forced(monkeypatch):
    monkeypatch.setenv("RSAE_ENCODER", "split")
    assert routing.route("H100", 64, 3, 2, True, 2, training=False).forward == "split"
    monkeypatch.setenv("RSAE_ENCODER", "fastest")
    with pytest.raises(ConfigError, match="split or fused"):
        routing.route("H100", 64, 3, 2, True, 2, training=True)


@pytest.mark.parametrize("way", routing.WAYS)
def test_a_way_can_be_named(way):
    row = torch.zeros(4)
    gate = GateTensors(torch.ones(1, 4), torch.ones(1, 2), row[:1], row[:1], row[:1], row, row)
    cpu = torch.device("cpu")
    kind, route = backends.choose(f"triton:{way}", cpu, torch.float32, 8, gate, GateSpec(3, 2), True)
    assert (kind, route.forward, route.backward) == ("triton", way, way)


def test_both_ways_are_timed_and_the_faster_goes_into_the_table(tmp_path, monkeypatch):
    """In the interpreter, with a stub for a timer: the calls are the real ones."""
    monkeypatch.setattr(routing, "WIDTHS", (16,))
    monkeypatch.setattr(routing, "DEGREES", ((3, 2),))
    answers = []

    def timer(call):
        answers.append(call())
        return [0.5, 0.4, 0.2, 0.3][(len(answers) - 1) % 4]

    rows = list(measure_routes.measure(torch.device("cpu"), timer, n_tokens=20, d_sae=24))
    assert len(rows) == 2 * 2
    assert all((row["forward"], row["backward"], row["source"]) == ("fused", "split", "measured") for row in rows)
    assert rows[0]["forward_split_ms"] == 0.5
    for split, fused in zip(answers[::2], answers[1::2], strict=True):  # both ways do the same work
        one, other = (found.z if hasattr(found, "z") else found.dh for found in (split, fused))
        assert ((one - other).abs() < 0.05).float().mean() > 0.98  # but where rounding decides on activity
    path = tmp_path / "routes.json"
    routing.write(path, [{**row, "device": "GPU of tomorrow"} for row in rows])
    written = json.loads(path.read_text())["rows"]
    assert [row for row in written if row["source"] == "measured"] == [
        {**row, "device": "GPU of tomorrow"} for row in rows
    ]
    assert measure_routes.name_in_table("NVIDIA H100 80GB HBM3") == "H100"
    assert measure_routes.name_in_table("GPU of tomorrow") == "GPU of tomorrow"


def test_nothing_is_measured_without_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA device"):
            measure_routes.main()
