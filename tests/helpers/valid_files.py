"""One small valid source of every format that is read, by name: what mutations start from."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from rsae_triton import FusedRationalSAE, fit_gate
from rsae_triton.activations import ActivationStore
from rsae_triton.commands.gates import _read_samples
from rsae_triton.common.archives import named_tensors, read_npz, read_torch
from rsae_triton.common.files import file_sha256, read_json, read_safetensors
from rsae_triton.remez.table import read_table, write_table
from rsae_triton.sae.base import SparseAutoencoder
from rsae_triton.teachers import JumpReluSAE, load_teacher

D_IN, D_SAE, K = 3, 5, 2
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR)


def linear(prefix_in, prefix_out):
    return {f"{prefix_in}.weight": draw(D_SAE, D_IN), f"{prefix_in}.bias": draw(D_SAE), prefix_out: draw(D_IN, D_SAE)}


def own(folder):
    FusedRationalSAE(D_IN, D_SAE, form="gated", generator=GENERATOR).save_pretrained(folder)


def saelens(folder):
    JumpReluSAE(D_IN, D_SAE, generator=GENERATOR).save_pretrained(folder)


def dictionary_learning(folder):
    weights = linear("encoder", "decoder.weight") | {"b_dec": draw(D_IN), "k": torch.tensor(K)}
    torch.save(weights, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "k": K, "layer": 1}}))


def sparsify(folder):
    save_file(
        {
            "encoder.weight": draw(D_SAE, D_IN),
            "encoder.bias": draw(D_SAE),
            "W_dec": draw(D_SAE, D_IN),
            "b_dec": draw(D_IN),
        },
        folder / "sae.safetensors",
    )
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "k": K, "num_latents": D_SAE}))


def gemma_scope(folder):
    arrays = {"W_enc": draw(D_IN, D_SAE), "W_dec": draw(D_SAE, D_IN), "b_enc": draw(D_SAE), "b_dec": draw(D_IN)}
    np.savez(
        folder / "params.npz", **{name: one.numpy() for name, one in arrays.items()}, threshold=np.ones(D_SAE, "f")
    )


def llama_scope(folder):
    (folder / "checkpoints").mkdir()
    weights = linear("encoder", "decoder.weight") | {"decoder.bias": draw(D_IN)}
    weights = {name: one.contiguous() for name, one in weights.items()}
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    config = {"d_model": D_IN, "act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise"}
    config["dataset_average_activation_norm"] = {"in": 2.0, "out": 2.0}
    (folder / "hyperparams.json").write_text(json.dumps(config))


def openai(folder):
    weights = {"pre_bias": draw(D_IN), "latent_bias": draw(D_SAE), "encoder.weight": draw(D_SAE, D_IN)}
    state = {"k": K, "postact_fn": "ReLU"}
    weights |= {"decoder.weight": draw(D_IN, D_SAE), "activation": "TopK", "activation_state_dict": state}
    torch.save(weights, folder / "8.pt")


def qwen_scope(folder):
    weights = {"W_enc": draw(D_SAE, D_IN), "W_dec": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "b_dec": draw(D_IN)}
    torch.save(weights, folder / "layer3.sae.pt")


def goodfire(folder):
    torch.save(linear("encoder_linear", "decoder_linear.weight") | {"decoder_linear.bias": draw(D_IN)}, folder / "l.pt")


def store(folder):
    rows = 6
    columns = {name: torch.arange(rows) for name in ("tokens", "documents", "positions", "contexts")}
    save_file(
        {"activations": draw(rows, D_IN), **columns, "sum": torch.zeros(D_IN)}, folder / "shard-00000.safetensors"
    )
    save_file({"mean": draw(D_IN)}, folder / "mean.safetensors")
    tokens = torch.arange(8).reshape(2, 4)
    save_file({"tokens": tokens, "documents": tokens % 2}, folder / "sequences.safetensors")
    (folder / "documents.jsonl").write_text('{"source": "s", "title": "t", "group": "g", "labels": {}}\n' * 2)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in folder.iterdir()}
    manifest = {
        "schema": 1, "key": "k", "dtype": "float32", "d_in": D_IN, "n_tokens": rows, "scale": 1.5, "norm_limit": None,
        "bos_token_id": 0,
        "hook_name": "blocks.0.hook_resid_pre", "mean_file": "mean.safetensors", "files": files,
        "sequences_file": "sequences.safetensors", "documents_file": "documents.jsonl",
        "shards": [{"file": "shard-00000.safetensors", "rows": rows}],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def gate_table(folder):
    write_table([fit_gate("relu", (3, 2)), fit_gate("ramp", (3, 2))], folder / "table.json")


def samples(folder):
    np.save(folder / "samples.npy", np.linspace(-1, 1, 20))


def _sae(folder):
    return tensors_of(FusedRationalSAE.from_pretrained(folder))


def _teacher(folder):
    path = next((one for one in folder.iterdir() if one.suffix == ".pt" and one.name != "ae.pt"), folder)
    kind = "sae" if (folder / "params.npz").exists() else None
    return tensors_of(load_teacher(path, k=K if path.name.endswith(".sae.pt") else None, kind=kind))


def tensors_of(sae: SparseAutoencoder):
    found = dict(sae.state_dict())
    x = torch.zeros(2, sae.d_in, dtype=sae.W_enc.dtype)
    assert sae.encode(x).shape == (2, sae.d_sae)
    return found


def _store(folder):
    """Everything a store gives, but its own checksums: those would hide what lies behind them."""
    opened = ActivationStore(folder, verify=False)
    one = next(opened.batches(2, epochs=1))
    assert len(opened.document_info) >= 0
    assert len(opened.labels("source")) == len(opened.document_info)
    columns = {name: getattr(opened, name) for name in ("mean", "tokens", "documents", "positions", "contexts")}
    return {**columns, "all": opened.tensor(), "batch": one, "sequences": opened.sequences.tokens,
            "counted": opened.sequences.counted}  # fmt: skip


def _table(folder):
    return {str(k): torch.as_tensor(fit.a) for k, fit in enumerate(read_table(folder / "table.json"))}


def _samples(folder):
    return {"samples": torch.from_numpy(np.array(_read_samples(folder / "samples.npy"), dtype=float))}


# Name -> (writes a valid source into a folder, reads it and returns its tensors).
SOURCES = {
    "rational": (own, _sae),
    **{
        write.__name__: (write, _teacher)
        for write in (saelens, dictionary_learning, sparsify, gemma_scope, llama_scope, openai, qwen_scope, goodfire)
    },
    "store": (store, _store),
    "gate_table": (gate_table, _table),
    "samples": (samples, _samples),
}

# By ending: reads one file on its own and returns its tensors.
READERS = {
    ".json": lambda path: dict(named_tensors(read_json(path))),
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pt": lambda path: dict(named_tensors(read_torch(path))),
}
