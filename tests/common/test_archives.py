"""Archives that strangers made so that what is looked at is not what is loaded, or so that looking takes for ever."""

import io
import json
import struct
import time
import zipfile

import pytest
import torch

from rsae_triton import load_teacher
from rsae_triton.common.archives import read_torch
from rsae_triton.common.errors import FormatError, NumericsError


def archive(path, data, version=2):
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/data.pkl", data)
        made.writestr("a/version", "3\n")
        made.writestr("a/byteorder", "little")
    return path


def nested(depth):
    """{(((h, h), (h, h)), ...): {}}: hashing the key takes 2^depth steps."""
    return b"\x80\x02})q\x00" + doubled(depth) + b"}s."


def doubled(count):
    return b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(count))


KEY = b"X\x01\x00\x00\x00k"
REFUSED = {
    "a key of tuples, 40 deep": (nested(40), "keys that are neither"),
    "a key of tuples, 22 deep": (nested(22), "keys that are neither"),
    "a key that is an empty tuple": (b"\x80\x02})}s.", "keys that are neither"),
    "a tuple of tuples as value": (
        b"\x80\x02}" + KEY + b")q\x00" + doubled(40) + b"s.", "unfold"),
    "a list of lists, outermost first": (  # l0 = [l1, l1], then l1 = [l2, l2], ...: small while it is made
        b"\x80\x02}X\x01\x00\x00\x00k]q\x00s" + b"".join(
            b"h" + bytes([i]) + b"(]q" + bytes([i + 1]) + b"h" + bytes([i + 1]) + b"e0" for i in range(40)) + b".",
        "unfold"),
    "a list in itself": (b"\x80\x02}X\x01\x00\x00\x00k]q\x00(h\x00es.", "holds itself"),
    "a dictionary filled by a call": (b"\x80\x02ccollections\nOrderedDict\n](" + KEY + b"K\x01\x86e\x85R.", "fills"),
    "a storage called by a tuple": (b"\x80\x02}X\x01\x00\x00\x00k()X\x01\x00\x00\x00cK\x00K\x00K\x00tQs.", "storages"),
    "a set": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "a stack that runs empty": (b"\x80\x02s.", "damaged"),
    "a number that is filled": (b"\x80\x02K\x01K\x02K\x03s.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pickle_that_would_take_for_ever_is_refused_at_once(tmp_path, name):
    data, message = REFUSED[name]
    started = time.perf_counter()
    with pytest.raises(FormatError, match=message) as found:
        read_torch(archive(tmp_path / "ae.pt", data))
    assert time.perf_counter() - started < 5
    assert len(str(found.value)) < 500
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    with pytest.raises(FormatError):
        load_teacher(tmp_path)


def test_files_written_by_torch_save_are_read(tmp_path):
    model = torch.nn.Linear(4, 5)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    odd = {"size": torch.Size([1, 2]), "type": torch.float32, "device": torch.device("cpu"), "none": None}
    torch.save(
        {"m": model.state_dict(), "o": optimizer.state_dict(), "odd": odd, "l": [1, (2.5, "x")]}, tmp_path / "a.pt"
    )
    found = read_torch(tmp_path / "a.pt")
    assert torch.equal(found["m"]["weight"], model.weight)
    assert found["odd"] == odd
    assert found["l"] == [1, (2.5, "x")]
    assert set(found["o"]["state"]) == {0, 1}


def two_directories(tmp_path):
    """One archive whose directory is read by readers that look at the end, and another one."""
    shown, hidden = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(2)}, shown)
    torch.save({"w": torch.ones(2)}, hidden)
    return shown.getvalue(), hidden.getvalue()


@pytest.mark.parametrize("how", ["a comment", "something before", "another locator", "the name in capitals"])
def test_an_archive_with_two_contents_is_refused(tmp_path, how):
    shown, hidden = two_directories(tmp_path)
    path = tmp_path / "a.pt"
    if how == "a comment":
        end = bytearray(hidden)
        end[-2:] = struct.pack("<H", len(shown))
        data = bytes(end) + shown
        data = data[:-2] + b"\1\0" + b"x"
    elif how == "something before":
        data = hidden + shown
    elif how == "another locator":
        data = bytearray(shown)
        assert data[-42:-38] == b"PK\6\7"
        data[-34:-26] = struct.pack("<Q", 0)
        data = bytes(data)
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as made:
            for name, content in (("A/DATA.PKL", shown), ("a/data.pkl", hidden)):
                with zipfile.ZipFile(io.BytesIO(content)) as source:
                    inner = next(one for one in source.namelist() if one.endswith("data.pkl"))
                    made.writestr(name, source.read(inner))
        data = buffer.getvalue()
    path.write_bytes(data)
    with pytest.raises(FormatError):
        read_torch(path)


def test_links_out_of_a_folder_are_refused_in_every_format(tmp_path):
    from valid_files import sparsify

    folder = tmp_path / "theirs"
    folder.mkdir()
    sparsify(folder)
    (folder / "sae.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "sae.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FormatError, match="outside its folder"):
        load_teacher(folder)


@pytest.mark.parametrize("size", ['"x"', "[0]", "NaN", "-3", "true"])
def test_config_sizes_that_are_not_positive_integers_are_refused(tmp_path, size):
    from valid_files import sparsify

    sparsify(tmp_path)
    for field in ("d_in", "expansion_factor"):
        config = {"d_in": 4, "k": 2, "expansion_factor": 10**9}
        (tmp_path / "cfg.json").write_text(json.dumps(config | {field: json.loads(size)}))
        with pytest.raises(FormatError, match=f"{field}=.*positive integer"):
            load_teacher(tmp_path)


def test_numbers_of_an_archive_are_looked_at_after_the_cast(tmp_path):
    import numpy as np

    arrays = {"W_enc": np.ones((3, 5), "f"), "W_dec": np.ones((5, 3), "f"), "b_enc": np.zeros(5, "f"),
              "b_dec": np.full(3, 1e300), "threshold": np.ones(5, "f")}  # fmt: skip
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(NumericsError, match=r"b_dec of .* do not fit into torch.float32"):
        load_teacher(tmp_path, kind="sae")
