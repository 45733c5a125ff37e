"""Damage of any kind to a file of any format: one of our errors, or finite tensors; in bounded memory."""

import json
import os
import pickle
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import Bytes, damaged
from safetensors.torch import save_file
from valid_files import SOURCES, saelens, store

from rsae_triton import FusedRationalSAE, load_teacher
from rsae_triton.activations import ActivationStore
from rsae_triton.common.archives import named_tensors, read_npz, read_torch
from rsae_triton.common.errors import FormatError, NumericsError, RsaeError
from rsae_triton.common.files import read_safetensors
from rsae_triton.remez.table import read_table


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> (folder, {path: bytes}) of a valid source of every format."""
    found = {}
    for name, (write, _) in SOURCES.items():
        folder = tmp_path_factory.mktemp(name)
        write(folder)
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
        found[name] = (folder, {path: path.read_bytes() for path in files})
    return found


def load(name, folder):
    """Its tensors, or None where it is refused. Any other error is the test's failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return SOURCES[name][1](folder)
        except RsaeError:
            return None


@pytest.mark.parametrize("name", SOURCES)
def test_undamaged_files_are_read(sources, name):
    tensors = load(name, sources[name][0])
    assert tensors
    assert all(bool(one.isfinite().all()) for one in tensors.values())


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=12, max_size=40))
def test_any_damage_is_refused_or_harmless(sources, name, data):
    folder, files = sources[name]
    source = Bytes(data)
    path = sorted(files)[source.below(len(files))]
    try:
        path.write_bytes(damaged(files[path], path.name, source))
        tensors = load(name, folder)
    finally:
        path.write_bytes(files[path])
    # Rows of a store are guarded by checksums, which this reader passes over to see what lies behind them.
    if tensors is not None and name != "store":
        assert all(bool(one.isfinite().all()) for one in tensors.values() if one.is_floating_point())


@pytest.mark.parametrize("name", SOURCES)
def test_half_of_every_file_is_refused(sources, name):
    folder, files = sources[name]
    for path, data in files.items():
        for length in (0, 1, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:length])
            try:
                if path.suffix != ".jsonl" or length > 1:  # no documents at all are documents too
                    assert load(name, folder) is None, (path.name, length)
            finally:
                path.write_bytes(data)


def places_in(document, at=()):
    """The path of keys and indices to every value of a JSON document; of a list, to its first three."""
    yield at
    inside = {dict: lambda: document.items(), list: lambda: enumerate(document[:3])}.get(type(document), tuple)
    for key, value in inside():
        yield from places_in(value, (*at, key))


@pytest.mark.parametrize("name", SOURCES)
def test_every_value_of_every_json_file_replaced_by_one_of_another_kind(sources, name):
    folder, files = sources[name]
    for path, data in files.items():
        if path.suffix != ".json":
            continue
        for at in places_in(json.loads(data)):
            for value in (None, -1, 1e300, 10**30, "x", [], {}, True):
                document = {"": json.loads(data)}
                *way, last = ("", *at)
                place = document
                for key in way:
                    place = place[key]
                place[last] = value
                path.write_text(json.dumps(document[""]))
                try:
                    tensors = load(name, folder)
                except Exception as error:
                    raise AssertionError(f"{path.name}: {value!r} at {at}") from error
                finally:
                    path.write_bytes(data)
                if tensors is not None and name != "store":
                    assert all(bool(one.isfinite().all()) for one in tensors.values() if one.is_floating_point()), at


@pytest.mark.parametrize("name", SOURCES)
def test_every_key_of_every_json_file_left_out(sources, name):
    """`make fuzz` found one whose first reader was lazy: a manifest without bos_token_id."""
    folder, files = sources[name]
    for path, data in files.items():
        for at in places_in(json.loads(data)) if path.suffix == ".json" else ():
            document = place = json.loads(data)
            for key in at[:-1]:
                place = place[key]
            if at and isinstance(place, dict):
                del place[at[-1]]
                path.write_text(json.dumps(document))
                try:
                    load(name, folder)
                except Exception as error:
                    raise AssertionError(f"{path.name} without {at}") from error
                finally:
                    path.write_bytes(data)


# -- memory in proportion to the file, whatever it claims


def peak_mib(call):
    """MiB that Python and numpy took at most while `call` failed with a FormatError."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            call()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_headers_that_claim_more_than_there_is(tmp_path):
    header = json.dumps({"W": {"dtype": "F32", "shape": [1 << 30, 1 << 10], "data_offsets": [0, 1 << 42]}}).encode()
    liar = tmp_path / "a.safetensors"
    liar.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    assert peak_mib(lambda: read_safetensors(liar)) < 4
    liar.write_bytes((1 << 62).to_bytes(8, "little") + header)
    assert peak_mib(lambda: read_safetensors(liar)) < 4
    saelens(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    for name in ("d_in", "d_sae"):
        huge = tmp_path / "sae" / "cfg.json"
        huge.write_text(json.dumps({**config, "architecture": "rational", name: 1 << 40}))
        assert peak_mib(lambda: FusedRationalSAE.from_pretrained(tmp_path / "sae")) < 4


def test_a_store_that_claims_more_rows_than_it_has(tmp_path):
    store(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["n_tokens"] = manifest["shards"][0]["rows"] = 1 << 50
    path.write_text(json.dumps(manifest))
    assert peak_mib(lambda: ActivationStore(tmp_path, verify=False).tensor()) < 4


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."])
@pytest.mark.parametrize("field", ["mean_file", "sequences_file", "documents_file", "shards", "files"])
def test_a_store_reads_nothing_outside_its_folder(tmp_path, field, name):
    inside = tmp_path / "store"
    inside.mkdir()
    store(inside)
    save_file({"mean": torch.zeros(3)}, tmp_path / "outside.safetensors")
    path = inside / "manifest.json"
    manifest = json.loads(path.read_text())
    if field == "shards":
        manifest["shards"][0]["file"] = name
    elif field == "files":
        manifest["files"][name] = {"bytes": 1, "sha256": ""}
    else:
        manifest[field] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="no file of its folder"):
        ActivationStore(inside)


def test_one_dictionary_ten_times_in_itself(tmp_path):
    nested = {"t": torch.zeros(1)}
    for _ in range(12):
        nested = {str(k): nested for k in range(10)}
    torch.save(nested, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 20_000
    with pytest.raises(FormatError, match="more than"):
        read_torch(tmp_path / "a.pt")
    assert len(dict(named_tensors({"a": {"b": torch.zeros(1)}}))) == 1


def test_an_archive_of_zeros_is_refused_in_the_size_of_its_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(1 << 26))
    assert (tmp_path / "params.npz").stat().st_size < 100_000
    assert peak_mib(lambda: read_npz(tmp_path / "params.npz")) < 8


@pytest.mark.parametrize("folder_of", ["../evil.npy", "/tmp/evil.npy"])
def test_names_in_an_archive_are_names_and_no_places(tmp_path, folder_of):
    arrays = {"W_enc": np.ones((3, 5), "f"), "W_dec": np.ones((5, 3), "f"), "b_enc": np.zeros(5, "f")}
    np.savez(tmp_path / "params.npz", **arrays, b_dec=np.zeros(3, "f"), threshold=np.ones(5, "f"))
    with zipfile.ZipFile(tmp_path / "params.npz", "a") as archive:
        archive.writestr(folder_of, b"not an array")
    before = set(Path(tmp_path).rglob("*"))
    with pytest.raises(FormatError):
        load_teacher(tmp_path)
    assert set(Path(tmp_path).rglob("*")) == before


class _Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae_weights.safetensors", "cfg.json", "table.json", "s.npy"])
def test_a_pickle_under_any_name_is_refused_and_not_run(tmp_path, name):
    marker = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickle.dumps({"W_enc": _Touch(marker)}))
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    for read in (load_teacher, FusedRationalSAE.from_pretrained, ActivationStore):
        with pytest.raises(FormatError):
            read(tmp_path)
    for read in (read_safetensors, read_npz, read_torch, read_table):
        with pytest.raises(FormatError):
            read(tmp_path / name)
    assert not marker.exists()


def test_nan_infinity_and_impossible_scales_are_refused(tmp_path):
    sae = FusedRationalSAE(3, 5, form="gated")
    sae.save_pretrained(tmp_path)
    weights = read_safetensors(tmp_path / "sae_weights.safetensors")
    for name, value, message in (
        ("W_dec", float("nan"), r"W_dec.*holds 1 NaN.*first \(nan\) at \[0, 0\]"),
        ("gate.log_input_scale", 1e30, "input_scale must be positive and finite"),
        ("gate.numerator_scale", -1.0, "numerator_scale must be positive"),
    ):
        bad = {key: one.clone() for key, one in weights.items()}
        bad[name].view(-1)[0] = value
        save_file(bad, tmp_path / "sae_weights.safetensors")
        with pytest.raises(NumericsError, match=message):
            FusedRationalSAE.from_pretrained(tmp_path)
