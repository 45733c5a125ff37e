"""To the hub and back, through huggingface_hub's own client, against a hub on this machine; never the network."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stub import Hub, serve

from rsae_triton import FusedRationalSAE, load_teacher
from rsae_triton.common.errors import FormatError, SourceError
from rsae_triton.evaluation.held_out import load_sae, load_saes
from rsae_triton.sae.transcoder import RationalTranscoder
from rsae_triton.teachers import ReluSAE

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client is pointed at; it reads its endpoint and cache once, when it is imported."""
    from huggingface_hub import constants

    hub = Hub()
    with serve(hub) as url:
        for name in (
            "HTTPS_PROXY",
            "https_proxy",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
            "HF_HUB_OFFLINE",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def rsae():
    return FusedRationalSAE(
        8, 16, generator=torch.Generator().manual_seed(0), metadata={"hook_name": "blocks.1.hook_mlp_out"}
    )


def test_push_and_load_again(hub):
    sae, x = rsae(), torch.randn(5, 8)
    metrics = {"rsae": {"mse": 12.5, "l0": 3.0}, "meta": {"model": "tiny", "quick": True}}
    address = sae.push_to_hub("someone/rsae", metrics=metrics, private=True, token=hub.token)
    assert "/someone/rsae/commit/" in address
    assert hub.private["someone/rsae"]
    files = hub.repos["someone/rsae"]["main"]
    assert sorted(files) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    assert "| Rational SAE | 12.50 | 3.00 | not measured |" in files["README.md"].decode()
    again = FusedRationalSAE.from_pretrained("someone/rsae")
    assert torch.equal(again.encode(x), sae.encode(x))
    assert again.metadata["hook_name"] == "blocks.1.hook_mlp_out"


def test_commands_take_hub_ids_and_addresses_of_ones_own_saes(hub):
    """What `rsae eval`, `match`, `probe` and `train` are given goes through `load_sae`, as a path."""
    sae, x = rsae(), torch.randn(5, 8)
    transcoder = RationalTranscoder(8, 16, skip=True, generator=torch.Generator().manual_seed(1))
    sae.push_to_hub("someone/rsae", token=hub.token)
    transcoder.push_to_hub("someone/transcoder", token=hub.token)
    ReluSAE(8, 16).push_to_hub("someone/teacher", token=hub.token)
    for name in ("someone/rsae", "someone/rsae/", "hf://someone/rsae", "someone/rsae@main",
                 "https://huggingface.co/someone/rsae/tree/main"):  # fmt: skip
        found = load_sae(Path(name))
        assert type(found) is FusedRationalSAE
        assert torch.equal(found.encode(x), sae.encode(x))
    loaded = load_saes([Path("someone/rsae"), Path("someone/teacher"), Path("someone/transcoder")])
    assert {name: type(one) for name, one in loaded.items()} == {
        "rsae": FusedRationalSAE, "teacher": ReluSAE, "transcoder": RationalTranscoder,
    }  # fmt: skip
    assert torch.equal(loaded["transcoder"](x), transcoder(x))


def test_revisions_are_kept_apart(hub):
    sae, other = rsae(), rsae()
    with torch.no_grad():
        other.b_dec.fill_(3)
    sae.push_to_hub("someone/rsae", token=hub.token)
    other.push_to_hub("someone/rsae", revision="second", token=hub.token)
    assert FusedRationalSAE.from_pretrained("someone/rsae").b_dec[0].item() == 0
    assert FusedRationalSAE.from_pretrained("someone/rsae", revision="second").b_dec[0].item() == 3
    with pytest.raises(SourceError, match="third"):
        FusedRationalSAE.from_pretrained("someone/rsae", revision="third")


def test_refused_uploads_and_downloads_give_the_reason(hub):
    with pytest.raises(SourceError, match="token"):
        rsae().push_to_hub("someone/rsae", token="hf_wrong")
    with pytest.raises(SourceError, match="no-one/nothing"):
        load_teacher("no-one/nothing")


def gemma():
    w = {"W_enc": np.ones((4, 6)), "W_dec": np.ones((6, 4)), "b_enc": np.zeros(6), "b_dec": np.zeros(4)}
    buffer = io.BytesIO()
    np.savez(buffer, threshold=np.ones(6, np.float32), **{name: one.astype(np.float32) for name, one in w.items()})
    return buffer.getvalue()


def test_one_sae_of_a_repository_of_many(hub):
    """Only that folder is fetched, and the name tells model and layer."""
    places = [f"layer_{layer}/width_16k/average_l0_{l0}" for layer in (3, 4) for l0 in (20, 70)]
    hub.add("google/gemma-scope-2b-pt-res", {f"{place}/params.npz": gemma() for place in places})
    teacher = load_teacher("google/gemma-scope-2b-pt-res/layer_4/width_16k/average_l0_70")
    assert teacher.metadata["hook_name"] == "blocks.4.hook_resid_post"
    assert teacher.metadata["model_name"] == "google/gemma-2-2b"
    fetched = [line for line in hub.log if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == 1
    assert "layer_4/width_16k/average_l0_70" in fetched[0]
    with pytest.raises(FormatError, match=r"holds 4 SAEs; name one, such as google/gemma-scope-2b-pt-res/layer_3"):
        load_teacher("google/gemma-scope-2b-pt-res")
    with pytest.raises(FormatError, match="holds 2 SAEs"):
        load_teacher("google/gemma-scope-2b-pt-res/layer_3")
    with pytest.raises(FormatError, match="no weights"):
        load_teacher("google/gemma-scope-2b-pt-res/layer_9")


def test_one_file_of_a_repository_of_files(hub):
    w = {"W_enc": torch.ones(6, 4), "W_dec": torch.ones(4, 6), "b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}
    buffer = io.BytesIO()
    torch.save(w, buffer)
    repo = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_2"
    hub.add(repo, {f"layer{layer}.sae.pt": buffer.getvalue() for layer in range(3)})
    teacher = load_teacher(f"{repo}/layer1.sae.pt")
    assert teacher.k == 2
    assert teacher.metadata["hook_name"] == "blocks.1.hook_resid_post"
    with pytest.raises(FormatError, match="holds 3 SAEs"):
        load_teacher(repo)


def test_configuration_of_the_run_comes_along(hub, tmp_path):
    from safetensors.torch import save_file

    w = {
        "encoder.weight": torch.ones(8, 4),
        "encoder.bias": torch.zeros(8),
        "W_dec": torch.ones(8, 4),
        "b_dec": torch.zeros(4),
    }
    save_file(w, tmp_path / "w")
    config = {"d_in": 4, "k": 2, "num_latents": 0, "expansion_factor": 2}
    files = {"config.json": b'{"model": "EleutherAI/pythia-70m"}'}
    for layer in range(2):
        files[f"layers.{layer}/cfg.json"] = json.dumps(config).encode()
        files[f"layers.{layer}/sae.safetensors"] = (tmp_path / "w").read_bytes()
    hub.add("EleutherAI/sae-pythia", files)
    teacher = load_teacher("EleutherAI/sae-pythia/layers.1")
    assert teacher.metadata["model_name"] == "EleutherAI/pythia-70m"
    assert teacher.metadata["hook_name"] == "blocks.1.hook_resid_post"


def test_offline_the_hubs_cache_is_used_and_missing_files_are_reported(hub, monkeypatch):
    sae = rsae()
    sae.push_to_hub("someone/rsae", token=hub.token)
    FusedRationalSAE.from_pretrained("someone/rsae")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(FusedRationalSAE.from_pretrained("someone/rsae").W_dec, sae.W_dec)
    with pytest.raises(SourceError, match="unreachable"):
        load_teacher("someone/else")
    with pytest.raises(SourceError, match="unreachable"):
        sae.push_to_hub("someone/rsae", token=hub.token)


def test_a_readme_of_ones_own_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# mine")
    ReluSAE(3, 4).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"
    ReluSAE(3, 4).save_pretrained(tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert "No scores were given" in card
    ReluSAE(3, 4).save_pretrained(tmp_path / "new", metrics={"rsae": {"mse": 1.0}})
    assert "No scores were given" not in (tmp_path / "new" / "README.md").read_text()
