"""Truncated, foreign, lying and malicious files: a FormatError each, in bounded memory, and no code is run."""

import contextlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsae_triton.common.archives import read_npz, read_torch
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, RsaeError
from rsae_triton.common.files import read_json, read_safetensors
from rsae_triton.teachers import FORMATS, JumpReluSAE, load_teacher

D_IN, D_SAE = 3, 5


def goodfire(path, **changes):
    w = {
        "encoder_linear.weight": torch.randn(D_SAE, D_IN),
        "encoder_linear.bias": torch.randn(D_SAE),
        "decoder_linear.weight": torch.randn(D_IN, D_SAE),
        "decoder_linear.bias": torch.randn(D_IN),
    }
    torch.save({**w, **changes}, path)
    return path


def gemma(path, **changes):
    w = {
        "W_enc": np.ones((D_IN, D_SAE), np.float32),
        "W_dec": np.ones((D_SAE, D_IN), np.float32),
        "b_enc": np.zeros(D_SAE, np.float32),
        "b_dec": np.zeros(D_IN, np.float32),
        "threshold": np.ones(D_SAE, np.float32),
    }
    np.savez(path, **{**w, **changes})
    return path


# -- pickles


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/rsae-was-here",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-here"

    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = goodfire(tmp_path / "evil.pt", extra=Touch())
    for call in (lambda: read_torch(path), lambda: load_teacher(path), lambda: load_teacher(path, format="goodfire")):
        with pytest.raises(FormatError):
            call()
    assert not marker.exists()
    with pytest.raises(FormatError, match=r"system.*refused"):
        read_torch(path)


@pytest.mark.parametrize("extra", [np.float32(1), torch.nn.Linear(2, 2), bytearray(8), Evil, io.BytesIO()])
def test_more_than_tensors_is_refused(tmp_path, extra):
    try:
        path = goodfire(tmp_path / "more.pt", extra=extra)
    except (TypeError, AttributeError, pickle.PicklingError):
        pytest.skip("torch.save itself refuses it")
    with pytest.raises(FormatError, match="refused"):
        read_torch(path)


def test_tensors_parameters_and_plain_values_are_read(tmp_path):
    path = tmp_path / "plain.pt"
    torch.save(
        {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(2).bfloat16(), "c": {"k": 3, "f": "ReLU"}, "d": [1.5]},
        path,
    )
    found = read_torch(path)
    assert found["c"] == {"k": 3, "f": "ReLU"}
    assert found["b"].dtype == torch.bfloat16


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    path = tmp_path / "expanded.pt"
    torch.save({"W": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(FormatError, match="more than the file holds"):
        read_torch(path)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    plain, packed = goodfire(tmp_path / "plain.pt"), tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(FormatError, match="compressed"):
        read_torch(packed)


def test_a_checkpoint_of_old_torch_says_what_to_do(tmp_path):
    path = tmp_path / "legacy.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"before 1\.6"):
        read_torch(path)


# -- arrays


def test_pickled_arrays_are_refused(tmp_path):
    path = gemma(tmp_path / "params.npz", threshold=np.array([Evil()], dtype=object))
    with pytest.raises(FormatError, match="pickled objects"):
        load_teacher(path)


def test_an_archive_that_swells_is_refused_unread(tmp_path):
    path = tmp_path / "params.npz"
    np.savez_compressed(path, W_enc=np.zeros((4000, 4000), np.float32))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(FormatError, match="unpacks from"):
        read_npz(path)


@pytest.mark.parametrize(("shape", "message"), [(b"(9, 9)", "another size"), (b"(9999,", "npz file of plain")])
def test_an_array_that_claims_another_shape_is_refused(tmp_path, shape, message):
    path, liar = gemma(tmp_path / "good.npz"), tmp_path / "params.npz"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(liar, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member).replace(b"(3, 5)", shape))
    with pytest.raises(FormatError, match=message):
        read_npz(liar)


# -- configurations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not a JSON object"),
        ('{"a": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (" " * (17 << 20), "bytes"),
        ("\udcff", "not JSON"),
    ],
)
def test_bad_configurations(tmp_path, text, message):
    path = tmp_path / "cfg.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=message):
        read_json(path)


# -- damage of every kind, to every kind of file


def whole_files(tmp_path):
    save_file({"a": torch.randn(4, 4)}, tmp_path / "a.safetensors")
    return {
        read_torch: goodfire(tmp_path / "a.pt"),
        read_npz: gemma(tmp_path / "a.npz"),
        read_safetensors: tmp_path / "a.safetensors",
    }


def test_truncation_anywhere(tmp_path):
    for read, path in whole_files(tmp_path).items():
        data = path.read_bytes()
        for length in {0, 1, 7, 8, *range(16, len(data) - 1, max(1, len(data) // 40)), len(data) - 1}:
            path.write_bytes(data[:length])
            with pytest.raises(FormatError):
                read(path)


def test_flipped_bytes_raise_nothing_but_our_errors(tmp_path):
    rng = np.random.default_rng(0)
    for read, path in whole_files(tmp_path).items():
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            damaged[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(RsaeError):
                read(path)


# -- what does not fit together


def test_unknown_folder_lists_what_was_looked_for(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"1")
    with pytest.raises(FormatError, match=r"holds model\.bin") as caught:
        load_teacher(tmp_path)
    for name, module in FORMATS.items():
        assert f"{name}: {module.LOOKS_FOR}" in str(caught.value)


def test_two_checkpoints_in_a_folder_are_not_guessed_at(tmp_path):
    goodfire(tmp_path / "a.pt")
    goodfire(tmp_path / "b.pt")
    with pytest.raises(FormatError, match="no format"):
        load_teacher(tmp_path)
    assert load_teacher(tmp_path / "b.pt").d_sae == D_SAE


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"W_dec": np.ones((D_SAE + 1, D_IN), np.float32)}, FormatError, "W_dec has shape"),
        ({"threshold": np.ones(D_SAE - 1, np.float32)}, FormatError, "threshold has shape"),
        ({"b_dec": np.zeros(D_IN, np.int64)}, FormatError, "int64"),
        ({"W_skip": np.ones((D_IN, D_IN), np.float32)}, FormatError, "unknown.*W_skip"),
        ({"W_enc": np.ones(D_IN, np.float32)}, FormatError, "matrices"),
        ({"W_enc": np.full((D_IN, D_SAE), np.nan, np.float32)}, NumericsError, "W_enc"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load_teacher(gemma(tmp_path / "params.npz", **changes), kind="sae")


def test_unknown_formats_and_missing_paths_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="sparsify"):
        load_teacher(tmp_path, format="onnx")
    with pytest.raises(FormatError, match="does not exist"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="does not exist"):
        load_teacher("no-slash-in-it")
    with pytest.raises(FormatError, match="does not exist"):
        load_teacher(tmp_path, format="sparsify")


def test_provenance_survives_saving(tmp_path):
    teacher = load_teacher(gemma(tmp_path / "params.npz"), kind="sae")
    teacher.save_pretrained(tmp_path / "ours")
    again = load_teacher(tmp_path / "ours")
    assert isinstance(again, JumpReluSAE)
    assert again.metadata["loaded_from"]["format"] == "gemma_scope"
    assert json.loads((tmp_path / "ours" / "cfg.json").read_text())["architecture"] == "jumprelu"
