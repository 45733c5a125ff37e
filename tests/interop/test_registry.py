"""SAELens' registry of pretrained SAEs: every layout in it is read here as SAELens reads it, or refused by name.

A folder is made in each layout, as the hub would hold it, and given to SAELens' own loader (its downloads answered from
the folder) and to ours. Where the two differ the difference is named and tested to be there.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("sae_lens")
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from rsae_triton import upgrade
from rsae_triton.commands.formats import Formats, run_formats
from rsae_triton.common.errors import ConfigError, FormatError
from rsae_triton.sae.transcoder import Transcoder
from rsae_triton.teachers import load_teacher, registry
from rsae_triton.teachers.layouts import LAYOUTS, layout

D, F, K = 8, 32, 5


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the hub, for SAELens and for ours: hub(repo)/file."""
    root = tmp_path / "hub"

    def download(repo_id, filename, *, subfolder=None, **_):
        path = root / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id, filename):
        from safetensors import safe_open

        with safe_open(root / repo_id / filename, "pt") as opened:
            return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    monkeypatch.setattr("rsae_triton.teachers.local_path", lambda source, revision=None: root / str(source))
    return root


def draw(*shape):
    return torch.randn(*shape)


def plain(entry, d=D):
    return {"W_enc": draw(d, F), "W_dec": draw(F, d), "b_enc": draw(F), "b_dec": draw(d)}


def at(hub, entry, *more):
    path = hub.joinpath(entry.repo, entry.path, *more)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def sae_lens(hub, entry):
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32",
              "hook_name": "blocks.1.hook_mlp_out", "model_name": entry.model,
              "apply_b_dec_to_input": True}  # fmt: skip
    config["normalize_activations"] = "none" if entry.scale is None else "expected_average_only_in"
    at(hub, entry, "cfg.json").write_text(json.dumps(config))
    save_file(plain(entry), at(hub, entry, "sae_weights.safetensors"))


def gemma_2(hub, entry):
    arrays = {name: one.numpy() for name, one in plain(entry).items()}
    np.savez(at(hub, entry, "params.npz"), **arrays, threshold=np.abs(draw(F).numpy()))


def gemma_3(hub, entry):
    w = plain(entry)
    arrays = {name.lower(): one for name, one in w.items()} | {"threshold": draw(F).abs()}
    if entry.path.endswith("affine"):
        arrays["affine_skip_connection"] = draw(D, D)
    save_file(arrays, at(hub, entry, "params.safetensors"))
    at(hub, entry, "config.json").write_text(json.dumps(loaders._infer_gemma_3_raw_cfg_dict(entry.repo, entry.path)))


def mwhanna(hub, entry):
    w = plain(entry)
    save_file({**w, "W_enc": w["W_enc"].t().contiguous()}, at(hub, entry))
    folder = at(hub, entry).parent
    folder.joinpath("config.yaml").write_text('model_name: "Qwen/Qwen3-4B"\nfeature_input_hook: "mlp.hook_in"\n')
    folder.joinpath("wandb-config.yaml").write_text(
        f"d_model: {{value: {D}}}\nd_feature: {{value: {F}}}\nbatch_size: {{value: 4}}\n"
    )


def dictionary_learning(kind, **trainer):
    def write(hub, entry):
        w = plain(entry)
        weights = {"encoder.weight": w["W_enc"].t(), "decoder.weight": w["W_dec"].t(), "encoder.bias": w["b_enc"]}
        weights["bias" if kind == "AutoEncoder" else "b_dec"] = w["b_dec"]
        if kind == "AutoEncoder":  # its own from_pretrained makes decoder rows unit vectors; SAELens leaves that out
            weights["decoder.weight"] = weights["decoder.weight"] / weights["decoder.weight"].norm(dim=0)
        if kind == "BatchTopKSAE":
            weights |= {"threshold": torch.tensor(0.7), "k": torch.tensor(K)}
        torch.save(weights, at(hub, entry, "ae.pt"))
        config = {
            "dict_class": kind,
            "activation_dim": D,
            "dict_size": F,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m-deduped",
        }
        text = json.dumps({"trainer": {**config, **trainer}, "buffer": {"ctx_len": 128}})
        at(hub, entry, "config.json").write_text(text)

    return write


def qwen(hub, entry):
    w = plain(entry)
    torch.save({**w, "W_enc": w["W_enc"].t(), "W_dec": w["W_dec"].t()}, at(hub, entry))


def llama_scope(hub, entry):
    w = plain(entry)
    rows = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)  # with which the decoder norm is no matter
    weights = {
        "encoder.weight": w["W_enc"].t(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": rows.t(),
        "decoder.bias": w["b_dec"],
    }
    folder = at(hub, entry, "hyperparams.json").parent
    norm = D**0.5 / entry.scale
    config = {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.5,
              "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post",
              "norm_activation": "dataset-wise",
              "dataset_average_activation_norm": {"in": norm, "out": norm}, "expansion_factor": F // D}  # fmt: skip
    weights = {name: one.contiguous() for name, one in weights.items()}
    if entry.layout == "llama_scope":
        (folder / "hyperparams.json").write_text(json.dumps(config))
        (folder / "checkpoints").mkdir()
        save_file(weights, folder / "checkpoints" / "final.safetensors")
    else:
        (folder / "config.json").write_text(json.dumps(config))
        stored = {f"dataset_average_activation_norm.{end}": torch.tensor(norm) for end in ("in", "out")}
        log = {"log_jumprelu_threshold": draw(F) / 4, **stored}
        save_file({**weights, **log}, folder / "sae_weights.safetensors")


def goodfire(hub, entry):
    w = plain(entry)
    torch.save(
        {"encoder_linear.weight": w["W_enc"].t(), "encoder_linear.bias": w["b_enc"],
         "decoder_linear.weight": w["W_dec"].t(), "decoder_linear.bias": w["b_dec"]},
        at(hub, entry),
    )  # fmt: skip


def deepseek(hub, entry):
    w = plain(entry)
    torch.save(
        {"encoder.weight": w["W_enc"].t(), "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].t(),
         "decoder.bias": w["b_dec"]},
        at(hub, entry),
    )  # fmt: skip


def hook_z(hub, entry):
    torch.save(plain(entry), at(hub, entry))
    config = {"act_size": D, "dict_size": F, "act_name": "blocks.1.attn.hook_z"}
    at(hub, entry).with_name(entry.path.split(".pt")[0] + "_cfg.json").write_text(json.dumps(config))


CASES = {
    "gpt2-small-res-jb": sae_lens,
    "gpt2-small-mlp-tm": sae_lens,
    "mistral-7b-res-wg": sae_lens,
    "gemma-scope-2b-pt-res-canonical": gemma_2,
    "gemma-scope-9b-pt-att": gemma_2,
    "gemma-scope-2b-pt-transcoders": gemma_2,
    "gemma-scope-2-270m-it-res": gemma_3,
    "gemma-scope-2-1b-pt-att-all": gemma_3,
    "gemma-scope-2-1b-pt-transcoders": gemma_3,
    "gemma-scope-2-270m-pt-transcoders": gemma_3,
    "mwhanna-qwen3-4b-transcoders": mwhanna,
    "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109": dictionary_learning("AutoEncoderTopK", k=K),
    "sae_bench_gemma-2-2b_vanilla_width-2pow12_date-1109": dictionary_learning("AutoEncoder"),
    "gpt-oss-20b-andyrdt": dictionary_learning("BatchTopKSAE", k=K),
    "qwen-scope-3-1.7b-base-w32k-l50": qwen,
    "llama_scope_lxr_8x": llama_scope,
    "llama_scope_r1_distill": llama_scope,
    "goodfire-llama-3.1-8b-instruct": goodfire,
    "goodfire-llama-3.3-70b-instruct": goodfire,
    "gpt2-small-hook-z-kk": hook_z,
    "deepseek-r1-distill-llama-8b-qresearch": deepseek,
}
# SAELens' loaders know the sizes of these releases without looking at the files.
SIZES = {"get_gemma_2_config_from_hf", "get_gemma_2_transcoder_config_from_hf", "get_qwen_scope_config_from_hf",
         "get_goodfire_config_from_hf", "get_deepseek_r1_config_from_hf"}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("release", CASES)
def test_a_registry_release_computes_the_same_as_in_saelens(hub, monkeypatch, release):
    torch.manual_seed(0)
    sae_id = next(iter(get_pretrained_saes_directory()[release].saes_map))
    entry = registry.entry(release, sae_id)
    CASES[release](hub, entry)
    own = {name: getattr(loaders, name) for name in SIZES}
    for name, getter in own.items():
        overrides = {"d_in": D, "d_sae": F, **({"d_out": D} if "transcoder" in name else {})}
        overrides |= {"k": K, "activation_fn_kwargs": {"k": K}} if "qwen" in name else {}
        monkeypatch.setattr(
            loaders, name, lambda *a, getter=getter, overrides=overrides, **k: {**getter(*a, **k), **overrides}
        )
    k = K if entry.layout == "qwen_scope" else None
    theirs = SAE.from_pretrained(release, sae_id)
    ours = load_teacher(release=release, sae_id=sae_id, k=k)
    x = draw(64, D)
    heads = theirs.cfg.reshape_activations == "hook_z"
    z, x_hat = _saelens(theirs, x, heads)
    if release == "llama_scope_lxr_8x":
        # SAELens multiplies the threshold, too, by the input's factor (teachers/llama_scope.py).
        assert not torch.allclose(ours.encode(x), z, atol=1e-2)
    else:
        torch.testing.assert_close(ours.encode(x), z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(x), x_hat, atol=1e-4, rtol=1e-4)
    assert isinstance(ours, Transcoder) == ("transcoder" in release)
    again = load_teacher(f"{release}/{sae_id}", k=k)
    assert torch.equal(again(x), ours(x))
    # The object in memory is a teacher as well: what it computes, whatever its file said.
    from_object = load_teacher(theirs)
    if not isinstance(ours, Transcoder):
        assert upgrade(theirs, x.repeat(4, 1)).metadata["stage1"]["relative_error"] < 1
    torch.testing.assert_close(from_object.encode(x), z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(from_object(x), x_hat, atol=1e-4, rtol=1e-4)
    assert isinstance(from_object, Transcoder) == isinstance(ours, Transcoder)


def _saelens(sae, x, heads):
    """Codes and reconstructions; attention heads go in and come out as [token, head, d_head]."""
    x = x.reshape(len(x), 2, D // 2) if heads else x
    return sae.encode(x), sae(x).flatten(1)


def test_every_layout_of_the_registry_is_known_and_97_in_a_hundred_are_read(tmp_path):
    every = registry.entries()
    assert len(every) == sum(len(one.saes_map) for one in get_pretrained_saes_directory().values())
    assert {one.layout for one in every} | {"sparsify"} == set(LAYOUTS)
    assert all(layout(one).format or layout(one).why for one in every)
    assert {one.layout for one in every if layout(one).format} == {registry.entry(name, next(iter(
        get_pretrained_saes_directory()[name].saes_map))).layout for name in CASES}  # fmt: skip
    result = run_formats(Formats(out=tmp_path / "formats.json"))
    assert result == json.loads((tmp_path / "formats.json").read_text())
    assert result["read"] >= 0.97 * result["entries"] > 13_000


def test_the_page_holds_the_count(capsys):
    from pathlib import Path

    run_formats(Formats(markdown=True))
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert capsys.readouterr().out.strip() in page


@pytest.mark.parametrize("release", ["mntss-gemma-2-2b-2.5m-clt-as-per-layer", "temporal-sae-gemma-2-2b"])
def test_refused_registry_entries_give_the_reason(hub, release):
    entry = registry.entry(release, next(iter(get_pretrained_saes_directory()[release].saes_map)))
    if "clt" in release:
        for part in ("enc", "dec"):
            save_file({f"W_{part}_0": draw(F, D)}, at(hub, entry).with_name(f"W_{part}_0.safetensors"))
        shutil.copytree(hub / entry.repo, hub / entry.source)
    else:
        at(hub, entry, "conf.yaml").write_text("llm: {}\n")
        save_file({"D": draw(F, D)}, at(hub, entry, "latest_ckpt.safetensors"))
    with pytest.raises(FormatError, match=r"cross-layer|temporal"):
        load_teacher(f"{release}/{entry.sae_id}")


def test_scaling_factors_known_only_to_saelens_registry_are_applied(hub):
    """gpt2-small-mlp-tm: the file says that there is one, the registry which."""
    entry = registry.entry("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")
    sae_lens(hub, entry)
    teacher = load_teacher("gpt2-small-mlp-tm/blocks.0.hook_mlp_out")
    assert any(f"activations * {entry.scale:.9g}" in one for one in teacher.metadata["loaded_from"]["folded"])
    with pytest.raises(FormatError, match="activation_scale"):
        load_teacher(hub / entry.source)
    with pytest.raises(ConfigError, match="did you mean"):
        load_teacher("gpt2-small-mlp-tm/blocks.0.hook_mlp_ou")
