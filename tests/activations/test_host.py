from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from rsae_triton.activations import dequantise, layers, load_host
from rsae_triton.common.errors import ConfigError, FormatError, ShapeError, SourceError


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request):
    """`(through transformers, through TransformerLens)`, float32."""
    pytest.importorskip("transformer_lens")
    folder = str(request.getfixturevalue(request.param))
    return tuple(
        load_host(folder, library=library, dtype="float32", device="cpu")
        for library in ("transformers", "transformer_lens")
    )


def some_tokens(host, rows=3, length=12):
    tokens = torch.randint(3, host.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = host.bos_token_id
    return tokens


def hooks(host):
    """Every hook registered on the module and the bridge, and every layer whose forward is not its class's."""
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules())
    count += sum("forward" in vars(m) for m in host.model.modules())
    if host.bridge is not None:
        count += sum(len(p.fwd_hooks) + len(p._forward_hooks) for p in host.bridge.hook_dict.values())
    return count


def loss_of(logits, tokens):
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


# --- loading ----------------------------------------------------------------------------------------------------


def test_a_host_reports_its_library_width_layers_and_default_hook(both):
    plain, lens = both
    assert (plain.library, lens.library) == ("transformers", "transformer_lens")
    assert plain.d_model == 32
    assert plain.n_layers in (3, 4)
    assert plain.default_hook == "blocks.2.hook_resid_pre"
    assert plain.dtype == torch.float32
    assert plain.bos_token_id == 1
    assert plain.fingerprint() == lens.fingerprint()
    assert not plain.model.training
    assert all(not p.requires_grad for p in plain.model.parameters())


def test_fingerprint_tells_weights_and_dtypes_apart(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    first = load_host(str(llama), library="transformers", dtype="float32").fingerprint()
    assert load_host(str(llama), library="transformers", dtype="bf16").fingerprint() != first
    other = shutil.copytree(llama, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert load_host(str(other), library="transformers", dtype="float32").fingerprint() != first


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nobody/nothing", SourceError, "unreachable"),
        ("gpt5", SourceError, "no model named 'gpt5'"),
        ("/no/such/folder", SourceError, "check the path"),
        ("missing.gguf", SourceError, "missing.gguf"),
    ],
)
def test_unknown_models_are_one_line(monkeypatch, name, error, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=words) as caught:
        load_host(name)
    assert "\n" not in str(caught.value)


def test_broken_folders_and_files_are_named(tmp_path, llama):
    with pytest.raises(FormatError, match=r"config\.json"):
        load_host(str(tmp_path))
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(FormatError, match="broken"):
        load_host(str(broken))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(FormatError, match=r"x\.gguf"):
        load_host(str(tmp_path / "x.gguf"))


def test_bad_options_are_refused(llama):
    with pytest.raises(ConfigError, match="float8"):
        load_host(str(llama), dtype="float8")
    with pytest.raises(ConfigError, match="library"):
        load_host(str(llama), library="keras")
    with pytest.raises(ConfigError, match="abacus"):
        load_host(str(llama), device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA"):
            load_host(str(llama), device="cuda")


def test_dequantising_is_all_or_nothing(cache, tmp_path, monkeypatch, llama):
    (tmp_path / "m.gguf").write_bytes(b"x")

    def killed(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(dequantise, "_write_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        dequantise.gguf_model(tmp_path / "m.gguf")
    assert [p for p in (cache / "models").iterdir() if p.is_dir()] == []

    calls = []

    def copy(gguf, folder):
        calls.append(gguf)
        shutil.copytree(llama, folder, dirs_exist_ok=True)

    monkeypatch.setattr(dequantise, "_write_folder", copy)
    first = load_host(str(tmp_path / "m.gguf"), library="transformers")
    assert first.fingerprint() == load_host(str(tmp_path / "m.gguf"), library="transformers").fingerprint()
    assert len(calls) == 1
    (tmp_path / "m.gguf").write_bytes(b"changed")
    load_host(str(tmp_path / "m.gguf"), library="transformers")
    assert len(calls) == 2


def test_without_transformer_lens_auto_is_transformers(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    host = load_host(str(llama))
    assert (host.bridge, host.library) == (None, "transformers")
    with pytest.raises(ConfigError, match="without transformer_lens"):
        host.resolve_hook("blocks.1.attn.hook_z")
    with pytest.raises(SourceError, match="pip install"):
        load_host(str(llama), library="transformer_lens")


def test_a_model_that_transformer_lens_cannot_run_is_run_without(llama, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def refuse(*_, **__):
        raise KeyError("no adapter for LlamaForCausalLM")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", refuse)
    with pytest.warns(UserWarning, match=r"no adapter for LlamaForCausalLM.*using transformers alone"):
        assert load_host(str(llama)).bridge is None
    with pytest.raises(SourceError, match="use library='transformers'"):
        load_host(str(llama), library="transformer_lens")


def test_the_bridge_is_made_when_something_needs_it(llama):
    pytest.importorskip("transformer_lens")
    host = load_host(str(llama), dtype="float32", device="cpu")
    tokens, state = some_tokens(host), torch.get_rng_state()
    host.residual(tokens)
    host.next_token_loss(tokens, "blocks.1.mlp.hook_in", lambda x: x * 0)
    assert (host.lens.made, host.library) == (None, "transformers")
    assert host.residual(tokens, "blocks.1.attn.hook_z").shape == (3, 12, 32)
    assert (host.lens.made is host.bridge, host.library) == (True, "transformer_lens")
    assert torch.equal(torch.get_rng_state(), state)
    shared = {parameter.data_ptr() for parameter in host.model.parameters()}
    assert shared & {parameter.data_ptr() for parameter in host.bridge.parameters()} == shared


# --- places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.2.hook_resid_pree", "did you mean blocks.2.hook_resid_pre"),
        ("blocks.77.hook_resid_pre", "layers, 0 to"),
        ("zzz", "try blocks.2.hook_resid_pre"),
    ],
)
def test_a_wrong_hook_names_near_ones(both, llama, name, words):
    for host in both:
        with pytest.raises(ConfigError, match=words):
            host.residual(some_tokens(host), name)
    with pytest.raises(ConfigError, match=words):
        load_host(str(llama), library="transformers", hook_name=name)


def test_places_only_transformer_lens_has(both):
    plain, lens = both
    count = hooks(lens)
    with pytest.raises(ConfigError, match="without transformer_lens"):
        plain.resolve_hook("blocks.1.hook_resid_mid")
    tokens = some_tokens(lens)
    mid = lens.residual(tokens, "blocks.1.hook_resid_mid")
    mlp = lens.residual(tokens, "blocks.1.hook_mlp_out")
    torch.testing.assert_close(mid + mlp, lens.residual(tokens, "blocks.1.hook_resid_post"), atol=1e-5, rtol=1e-5)
    assert lens.hook_width("blocks.1.attn.hook_z") == 32
    with pytest.raises(ConfigError, match="no \\[batch, token, width\\]"):
        lens.residual(tokens, "blocks.1.attn.hook_pattern")
    assert hooks(lens) == count


def test_the_default_hook_can_be_chosen(llama):
    host = load_host(str(llama), library="transformers", dtype="float32", hook_name="blocks.1.hook_resid_post")
    assert host.default_hook == "blocks.1.hook_resid_post"
    tokens = some_tokens(host)
    assert torch.equal(host.residual(tokens), host.residual(tokens, "blocks.2.hook_resid_pre"))


# --- numbers ----------------------------------------------------------------------------------------------------


def test_residuals_are_those_of_both_libraries(both):
    plain, lens = both
    tokens = some_tokens(plain)
    states = plain.model(tokens, output_hidden_states=True).hidden_states
    for layer in range(plain.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        pre = plain.residual(tokens, name)
        assert torch.equal(pre, lens.residual(tokens, name))
        torch.testing.assert_close(pre, states[layer])
        _, cached = lens.bridge.run_with_cache(tokens, names_filter=lambda n: "hook_resid_p" in n)
        torch.testing.assert_close(pre, cached[name], atol=1e-5, rtol=1e-5)
        post = f"blocks.{layer}.hook_resid_post"
        torch.testing.assert_close(plain.residual(tokens, post), cached[post], atol=1e-5, rtol=1e-5)


def test_reading_stops_at_the_hook(both):
    host = both[0]
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(layers.decoder_layers(host.model))
    ]
    host.residual(some_tokens(host), "blocks.1.hook_resid_pre")
    host.residual(some_tokens(host), "blocks.1.hook_resid_post")
    for handle in handles:
        handle.remove()
    assert ran == [0, 0, 1]


def test_losses_with_replaced_residuals_are_those_of_both_libraries(both):
    plain, lens = both
    tokens = some_tokens(plain)
    clean = loss_of(plain.model(tokens).logits, tokens)
    torch.testing.assert_close(plain.next_token_loss(tokens), clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lens.next_token_loss(tokens), clean, atol=1e-5, rtol=1e-5)

    def shrink(x):
        return 0.3 * x.flip(-1)

    for layer in range(plain.n_layers):
        for side in ("pre", "post"):
            name = f"blocks.{layer}.hook_resid_{side}"
            hooked = lens.bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: shrink(x))])
            expected = loss_of(hooked, tokens)
            assert (expected - clean).abs().mean() > 1e-2
            torch.testing.assert_close(plain.next_token_loss(tokens, name, shrink), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(lens.next_token_loss(tokens, name, shrink), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_be_resumed_gives_the_same_losses(llama, host, monkeypatch):
    slow = load_host(str(llama), library="transformers", dtype="float32")

    def fails(*_):
        raise TypeError("needs more than the residual")

    monkeypatch.setattr(layers, "resumed", fails)
    tokens, name = some_tokens(host), "blocks.2.hook_resid_pre"
    whole = slow.splice(tokens, name, {"half": lambda x: x / 2, "clean": None}, kl=True)
    assert slow._resumable == {2: False}
    monkeypatch.undo()
    quick = host.splice(tokens, name, {"half": lambda x: x / 2, "clean": None}, kl=True)
    assert host._resumable[2]
    for key in whole:
        torch.testing.assert_close(whole[key].nll, quick[key].nll)
        torch.testing.assert_close(whole[key].kl, quick[key].kl, atol=1e-6, rtol=1e-4)


def test_splice_gives_kl_and_keeps_the_callers_residual(host):
    tokens = some_tokens(host)

    def in_place(x):
        x.zero_()
        return x

    got = host.splice(tokens, None, {"zero": in_place, "clean": None, "same": lambda x: x}, kl=True)
    assert list(got) == ["zero", "clean", "same"]
    assert got["zero"].nll.shape == got["zero"].kl.shape == (3, 11)
    assert got["zero"].nll.dtype == torch.float32
    assert got["clean"].kl.abs().max() == 0
    assert got["same"].kl.abs().max() < 1e-6
    clean = host.model(tokens).logits[:, :-1].log_softmax(-1)
    handle = layers.decoder_layers(host.model)[2].register_forward_pre_hook(
        lambda m, a: (torch.zeros_like(a[0]), *a[1:])
    )
    zeroed = host.model(tokens).logits[:, :-1].log_softmax(-1)
    handle.remove()
    torch.testing.assert_close(got["zero"].kl, (clean.exp() * (clean - zeroed)).sum(-1), atol=1e-5, rtol=1e-4)
    assert host.splice(tokens, None, {"a": None})["a"].kl is None


def test_replacing_at_a_place_with_heads(both):
    lens = both[1]
    tokens, name = some_tokens(lens), "blocks.1.attn.hook_z"
    hooked = lens.bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x * 0)])
    got = lens.next_token_loss(tokens, name, lambda z: z * 0 if z.shape == (3, 12, 32) else z)
    torch.testing.assert_close(got, loss_of(hooked, tokens))
    assert (got - lens.next_token_loss(tokens)).abs().mean() > 1e-3


@pytest.mark.parametrize("place", ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_nothing_is_left_behind_when_replace_raises(both, place):
    def breaks(_):
        raise ZeroDivisionError("in the caller's code")

    for host in both:
        if host.bridge is None and "mlp" in place:
            continue
        tokens = some_tokens(host)
        before, count = host.next_token_loss(tokens), hooks(host)
        with pytest.raises(ZeroDivisionError):
            host.next_token_loss(tokens, place, breaks)
        with pytest.raises(ShapeError, match="replace returned"):
            host.next_token_loss(tokens, place, lambda x: x[:, 1:])
        assert hooks(host) == count
        assert torch.equal(host.next_token_loss(tokens), before)


def test_tokens_are_checked(host):
    with pytest.raises(ShapeError, match="integers"):
        host.residual(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="integers"):
        host.residual(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ShapeError, match="at least 2"):
        host.next_token_loss(torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="longer context"):
        host.residual(torch.ones(1, 65, dtype=torch.long))


def test_importing_the_package_loads_no_optional_library():
    code = (
        "import sys, rsae_triton.activations; "
        "print(sorted({'transformers', 'transformer_lens', 'datasets', 'gguf', 'requests'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
