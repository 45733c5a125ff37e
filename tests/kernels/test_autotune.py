"""RSAE_AUTOTUNE=1 without a GPU: a stub says what is fast. The choice, its file, and what may go wrong with it."""

import json
import os
from importlib import import_module

import pytest
import torch
from gate_cases import flags, random_gate, to
from triton.runtime.errors import OutOfResources

from rsae_triton.kernels import autotune, encode_backward, encode_forward, rational_backward, rational_forward
from rsae_triton.kernels.configs import MatmulTile, PointwiseTile
from rsae_triton.ops.reference import GateSpec

SPEC = GateSpec(3, 2)


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Switches it on with a stub in place of the timer. Yields the list of launches it was asked to time."""
    timed = []

    def measure(launch):
        launch()
        timed.append(launch.args[0])
        return 1.0 + len(timed) % 3  # the second of every three is the slowest, the third the fastest

    monkeypatch.setenv("RSAE_AUTOTUNE", "1")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "can_measure", lambda on: True)
    monkeypatch.setattr(autotune, "device_name", lambda on: "a stub")
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr(autotune, "_chosen", {})
    pointwise = [PointwiseTile(2, 32, 4, 2), PointwiseTile(8, 32, 1, 4)]
    matmul = [MatmulTile(16, 16, 16, 1, 4, 2, lanes=1), MatmulTile(32, 32, 16, 2, 4, 2, lanes=1)]
    for module in ("rational_forward", "rational_backward"):
        monkeypatch.setattr(
            import_module(f"rsae_triton.kernels.{module}"), "pointwise_tiles", lambda *_: iter(pointwise)
        )
    for module in ("encode_forward", "encode_backward"):
        monkeypatch.setattr(
            import_module(f"rsae_triton.kernels.{module}"), "product_tiles", lambda *_, **__: iter(matmul)
        )
    return timed


def forward(device, n_tokens=40, degree=(3, 2)):
    h = torch.randn(4, n_tokens, generator=torch.Generator().manual_seed(0)).to(device)
    return rational_forward(h, to(random_gate(*degree, 4, 1), device), **flags(GateSpec(*degree)))[0]


def files(tmp_path):
    return sorted((tmp_path / "autotune").iterdir()) if (tmp_path / "autotune").exists() else []


def test_autotune_is_off_by_default(device, tuning, monkeypatch, tmp_path):
    for value in (None, "0", ""):
        if value is None:
            monkeypatch.delenv("RSAE_AUTOTUNE")
        else:
            monkeypatch.setenv("RSAE_AUTOTUNE", value)
        forward(device)
    assert tuning == []
    assert files(tmp_path) == []


def test_the_fastest_tile_is_taken_and_remembered(device, tuning, monkeypatch, tmp_path):
    plain = forward(device)
    assert len(tuning) == 3  # the table's own tile and two more
    [file] = files(tmp_path)
    content = json.loads(file.read_text())
    assert content["tile"] == list(tuning[2]) == [8, 32, 1, 4, 1]
    assert content["ms"] == 1.0
    assert [one["ms"] for one in content["tried"]] == [2.0, 3.0, 1.0]
    assert content["key"]["device"] == "a stub"
    assert content["key"]["triton"]
    torch.testing.assert_close(forward(device), plain)
    monkeypatch.setattr(autotune, "_chosen", {})  # as a new process would start
    forward(device)
    forward(device, n_tokens=35)  # the same power of two, and as little divisible by 16
    assert len(tuning) == 3


@pytest.mark.parametrize("change", ["degree", "tokens", "source", "device"])
def test_tiles_are_timed_again_when_source_device_or_shape_changes(change, device, tuning, monkeypatch, tmp_path):
    forward(device)
    if change == "source":
        monkeypatch.setattr(autotune, "source_hash", lambda: "another")
    if change == "device":
        monkeypatch.setattr(autotune, "device_name", lambda on: "another")
    forward(device, n_tokens=90 if change == "tokens" else 40, degree=(5, 4) if change == "degree" else (3, 2))
    assert len(tuning) == 6
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": {}, "tile": [1, 2, 3, 4]}', "foreign tile"])
def test_a_file_that_is_no_answer_is_replaced(content, device, tuning, monkeypatch, tmp_path):
    forward(device)
    [file] = files(tmp_path)
    right = file.read_text()
    # A tile that was never a candidate, under the right key.
    file.write_text(json.dumps({**json.loads(right), "tile": [3, 5, 7, 1]}) if content == "foreign tile" else content)
    monkeypatch.setattr(autotune, "_chosen", {})
    forward(device)
    assert len(tuning) == 6
    assert file.read_text() == right


def test_a_file_is_written_whole_or_not_at_all(device, tuning, monkeypatch, tmp_path):
    def broken(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(autotune, "keep", broken)
        with pytest.warns(UserWarning, match=r"disk full.*RSAE_CACHE"):
            forward(device)
    assert files(tmp_path) == []
    forward(device)
    assert len(tuning) == 3  # this process remembers


def test_a_folder_that_cannot_be_made_is_said(device, tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        forward(device)


def test_tiles_that_do_not_fit_are_passed_over(device, tuning, monkeypatch, tmp_path):
    stub = autotune.measure
    refused = []

    def measure(launch):
        if launch.args[0] in refused:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return stub(launch)

    monkeypatch.setattr(autotune, "measure", measure)
    refused.append(PointwiseTile(8, 32, 1, 4))
    plain = forward(device)
    [file] = files(tmp_path)
    assert json.loads(file.read_text())["tile"] != [8, 32, 1, 4]
    assert [one["ms"] is None for one in json.loads(file.read_text())["tried"]] == [False, False, True]
    refused += [PointwiseTile(2, 32, 4, 2), *tuning]
    monkeypatch.setattr(autotune, "_chosen", {})
    file.unlink()
    torch.testing.assert_close(forward(device), plain)  # none is left: the table's own
    assert files(tmp_path) == []


def test_every_kernel_is_right_with_the_tile_it_found(device, tuning, monkeypatch, tmp_path):
    """Also the backward pass that overwrites dz, which has to survive all trials."""
    n_tokens, d_in, n_features = 40, 10, 21
    x, W, b, g = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)
        for shape in ((n_tokens, d_in), (d_in, n_features), (n_features,), (n_tokens, d_in))
    )
    gate, backward = to(random_gate(3, 2, n_features, 1), device), flags(SPEC, True)

    def everything():
        z, h, *sums = encode_forward(x, W, b, gate, save_h=torch.float32, **flags(SPEC))
        fused, _, fused_grads = encode_backward(g, W.T, h, None, None, gate, **backward)
        dh, grads = rational_backward(h, (g @ W).T.contiguous(), None, None, gate, inplace=True, **backward)
        return [z, h, *sums, fused, *fused_grads, dh, *grads]

    found = everything()
    assert {file.name.rsplit("-", 1)[0] for file in files(tmp_path)} == {
        "encode_forward", "encode_backward", "rational_backward",
    }  # fmt: skip
    assert len(tuning) == 9
    monkeypatch.delenv("RSAE_AUTOTUNE")
    for one, plain in zip(found, everything(), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_candidates_are_tiles_that_the_kernels_can_have(capability, itemsize):
    for backward in (False, True):
        tiles = list(autotune.product_tiles(capability, itemsize, backward=backward))
        assert 20 <= len(set(tiles)) == len(tiles) <= 150
        for tile in tiles:
            part = tile.tokens // tile.sub
            assert part >= 16
            assert part % (2 * tile.lanes) == 0
            assert (tile.features + tile.tokens) * tile.inner * itemsize * tile.stages <= 227 * 1024
    for n_tokens in (15, 16):
        tiles = list(autotune.pointwise_tiles(itemsize, n_tokens))
        assert len(set(tiles)) == len(tiles) >= 9
        assert all(tile.vector == 1 or n_tokens % 16 == 0 for tile in tiles)


def test_the_folder_follows_the_users(monkeypatch):
    monkeypatch.delenv("RSAE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(autotune.folder()) == "/somewhere/rsae-triton/autotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(autotune.folder()) == os.path.expanduser("~/.cache/rsae-triton/autotune")


def test_nothing_is_measured_where_the_interpreter_stands_in(device, monkeypatch):
    monkeypatch.setenv("RSAE_AUTOTUNE", "1")
    if device == "cpu":
        monkeypatch.setattr(autotune, "measure", lambda launch: pytest.fail("timed the interpreter"))
        forward(device)
