"""The ways a teacher is named: repository ids, release names of SAELens' registry, and what files leave unsaid."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rsae_triton.common.errors import ConfigError, FormatError, SourceError
from rsae_triton.teachers import TopKSAE, goodfire, load_teacher, registry, sparsify
from rsae_triton.teachers.parts import Files

D_IN, D_SAE = 16, 64
G = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=G)


def old_topk(folder, **trainer):
    """Writes a file as dictionary_learning saved AutoEncoderTopK before k was a buffer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"encoder.weight": draw(D_SAE, D_IN), "encoder.bias": draw(D_SAE), "decoder.weight": draw(D_IN, D_SAE)}
    torch.save({**weights, "b_dec": draw(D_IN)}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", **trainer}}))
    return folder


def test_k_of_an_old_topk_comes_from_its_configuration_or_from_the_caller(tmp_path):
    teacher = load_teacher(old_topk(tmp_path, k=8, layer=4, lm_name="EleutherAI/pythia-70m-deduped"))
    assert (type(teacher), teacher.k, teacher.relu) == (TopKSAE, 8, True)
    x = draw(10, D_IN)
    w = torch.load(tmp_path / "ae.pt")
    h = (x - w["b_dec"]) @ w["encoder.weight"].t() + w["encoder.bias"]
    kept = h >= h.topk(8).values[:, -1:]
    torch.testing.assert_close(teacher.encode(x), (h * kept).relu(), atol=1e-5, rtol=1e-5)
    assert load_teacher(tmp_path, k=8).k == 8
    with pytest.raises(FormatError, match=r"k=8.*k=9"):
        load_teacher(tmp_path, k=9)
    with pytest.raises(FormatError, match="pass k="):
        load_teacher(old_topk(tmp_path / "silent"))
    assert load_teacher(tmp_path / "silent", k=5).k == 5


@pytest.mark.parametrize("state", [{}, {"activation_state_dict": {"k": 5, "postact_fn": "ReLU"}}])
def test_files_of_openais_autoencoder_class_are_read(tmp_path, state):
    """torch.save(Autoencoder(...).state_dict()): the activation's state is spread over keys of its own."""
    weights = {"pre_bias": draw(D_IN), "encoder.weight": draw(D_SAE, D_IN), "latent_bias": draw(D_SAE),
               "decoder.weight": draw(D_IN, D_SAE), "stats_last_nonzero": torch.zeros(D_SAE).long(),
               "activation": "TopK", "activation.k": 5, "activation.postact_fn": "ReLU"}  # fmt: skip
    torch.save({**weights, **state}, tmp_path / "8.pt")
    teacher = load_teacher(tmp_path / "8.pt")
    assert (teacher.k, teacher.relu, teacher.normalize_activations) == (5, True, "layer_norm")
    torch.save({**weights, "activation_state_dict": {"k": 6}}, tmp_path / "8.pt")
    with pytest.raises(FormatError, match="gives two different values"):
        load_teacher(tmp_path / "8.pt")


def test_metadata_comes_from_the_requested_name_and_not_from_the_cache_folder(tmp_path):
    snapshot = tmp_path / "models--Goodfire--Llama-3.1-8B-Instruct-SAE-l19" / "snapshots" / "644acafa98be9120d1ef40"
    snapshot.mkdir(parents=True)
    parts = {"encoder_linear.weight": (D_SAE, D_IN), "encoder_linear.bias": (D_SAE,),
             "decoder_linear.weight": (D_IN, D_SAE), "decoder_linear.bias": (D_IN,)}  # fmt: skip
    torch.save({name: draw(*shape) for name, shape in parts.items()}, snapshot / "weights.pth")
    for name in (
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "hf://Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        str(snapshot),
    ):
        teacher = goodfire.read(Files(snapshot, name))
        assert teacher.metadata["model_name"] == "meta-llama/Llama-3.1-8B-Instruct"
        assert teacher.metadata["hook_name"] == "blocks.19.hook_resid_post"
    save_file({"encoder.weight": draw(D_SAE, D_IN), "encoder.bias": draw(D_SAE), "W_dec": draw(D_SAE, D_IN),
               "b_dec": draw(D_IN)}, snapshot / "sae.safetensors")  # fmt: skip
    (snapshot / "cfg.json").write_text(json.dumps({"d_in": D_IN, "num_latents": D_SAE, "k": 4}))
    assert sparsify.read(Files(snapshot, "owner/layers.3")).metadata["hookpoint"] == "layers.3"
    assert sparsify.read(Files(snapshot, "owner/layers.3")).metadata["hook_name"] == "blocks.3.hook_resid_post"


def saelens_folder(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"W_enc": draw(D_IN, D_SAE), "W_dec": draw(D_SAE, D_IN), "b_enc": draw(D_SAE), "b_dec": draw(D_IN)}
    save_file(weights, folder / "sae_weights.safetensors")
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.0"}}
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", **sizes, **config}))
    return folder


def test_arguments_that_nothing_is_done_with_are_refused(tmp_path):
    folder = saelens_folder(tmp_path)
    with pytest.raises(ConfigError, match="k=3 is for TopK"):
        load_teacher(folder, k=3)
    with pytest.raises(ConfigError, match="activation_scale"):
        load_teacher(folder, activation_scale=2.0)
    for wrong in ({}, {"release": "a"}, {"source": folder, "release": "a", "sae_id": "b"}, {"sae_id": "b"}):
        with pytest.raises(ConfigError, match="name an SAE by source"):
            load_teacher(**wrong)


REGISTRY = """\
some-release:
  conversion_func: null
  model: gpt2-small
  repo_id: {repo}
  config_overrides:
    normalize_activations: expected_average_only_in
  saes:
  - id: blocks.0.hook_resid_pre
    path: layer_0
    norm_scaling_factor: 0.5
  - id: 1
    path: layer_1
other-release:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/none
  saes:
  - id: a/b
    path: a/b
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A registry as SAELens has it, of a repository that the hub's cache would hold at tmp_path."""
    path = tmp_path / "pretrained_saes.yaml"
    path.write_text(REGISTRY.format(repo="owner/repo"))
    monkeypatch.setattr(registry, "registry_file", lambda: path)
    registry.releases.cache_clear()
    monkeypatch.setattr("rsae_triton.teachers.local_path", lambda source, revision=None: tmp_path / str(source))
    folder = saelens_folder(tmp_path / "owner" / "repo" / "layer_0")
    yield folder
    registry.releases.cache_clear()


def test_release_names_lead_to_their_files_and_factors(installed):
    """The factor stands in the registry alone, and so does the fact that there is one."""
    by_name = load_teacher("some-release/blocks.0.hook_resid_pre")
    by_words = load_teacher(release="some-release", sae_id="blocks.0.hook_resid_pre")
    plain = load_teacher(installed)
    x = draw(20, D_IN)
    for teacher in (by_name, by_words):
        assert teacher.metadata["model_name"] == "gpt2"
        assert teacher.metadata["loaded_from"]["release"] == "some-release"
        assert any("activations * 0.5" in one for one in teacher.metadata["loaded_from"]["folded"])
        expected = plain.decode(plain.encode(0.5 * x)) / 0.5
        torch.testing.assert_close(teacher(x), expected, atol=1e-4, rtol=1e-4)
    doubled = load_teacher("some-release/blocks.0.hook_resid_pre", activation_scale=1.5)
    torch.testing.assert_close(doubled.encode(x), plain.encode(1.5 * x), atol=1e-4, rtol=1e-4)


def test_names_that_the_registry_does_not_have_are_answered_with_those_it_has(installed):
    with pytest.raises(ConfigError, match=r"did you mean blocks\.0\.hook_resid_pre"):
        load_teacher("some-release/blocks.0.hook_resid_pos")
    with pytest.raises(ConfigError, match="did you mean some-release"):
        load_teacher(release="some-releas", sae_id="1")
    assert registry.find("owner/repo/layer_0") is None
    assert registry.find("some-release/1").source == "owner/repo/layer_1"
    assert [one.layout for one in registry.entries()] == ["sae_lens", "sae_lens", "gemma_2"]


def test_without_saelens_a_release_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(registry, "registry_file", lambda: None)
    with pytest.raises(SourceError, match="pip install sae-lens"):
        load_teacher(release="some-release", sae_id="1")
    assert registry.find("some-release/1") is None
