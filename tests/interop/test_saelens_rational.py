"""Rational SAEs inside SAELens: loaded, spliced, folded, evaluated, trained."""

import json

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-interop")
import sae_lens
from rational_cases import D_IN, D_SAE, FORMS, rsae
from sae_lens import SAE, SAETransformerBridge, TrainingSAE
from tiny_models import D_MODEL, bridge, llama

from rsae_triton import FusedRationalSAE
from rsae_triton.common.errors import ConfigError, SourceError
from rsae_triton.integrations import saelens, splice
from rsae_triton.sae.topk_rational import TopKRationalSAE


@pytest.fixture
def x():
    return torch.randn(4, 9, D_IN) + 0.2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm", "constant_norm_rescale"])
def test_load_from_disk(tmp_path, x, form, normalize_activations):
    ours = rsae(form, normalize_activations=normalize_activations, apply_b_dec_to_input=form != "direct")
    ours.save_pretrained(tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    assert isinstance(theirs, saelens.RationalSAE)
    with torch.no_grad():
        z = theirs.encode(x)
        assert torch.allclose(z, ours.encode(x), atol=1e-5)
        assert torch.equal(z != 0, ours.encode(x) != 0)
        assert 0 < (z != 0).float().mean() < 1
        assert torch.allclose(theirs(x), ours(x), atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    theirs.save_model(tmp_path / "theirs")
    again = FusedRationalSAE.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.encode(x), ours.encode(x))
    assert again.metadata["hook_name"] == "blocks.1.hook_resid_post"


def test_saedashboard_is_told_to_encode_all_features():
    """It slices every other SAE to the features that it shows; tests/interop/test_sae_dashboard.py runs it."""
    from sae_lens.saes.topk_sae import TopK

    assert isinstance(saelens.to_saelens(rsae()).activation_fn, TopK)


def test_hooks_between_product_and_gate_are_seen(x):
    theirs = saelens.to_saelens(rsae())
    with torch.no_grad():
        plain = theirs.encode(x)
        seen = []
        theirs.add_hook("hook_sae_acts_pre", lambda value, hook: seen.append(value))
        assert torch.allclose(theirs.encode(x), plain, atol=1e-6)
        theirs.reset_hooks()
        theirs.add_hook("hook_sae_acts_pre", lambda value, hook: torch.zeros_like(value))
        assert not theirs.encode(x).any()
    assert seen[0].shape == (4, 9, D_SAE)
    _, cache = theirs.run_with_cache(x)
    assert {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"} <= set(cache)


@pytest.mark.parametrize("form", FORMS)
def test_fold_W_dec_norm_changes_no_reconstruction(tmp_path, x, form):  # noqa: N802
    ours = rsae(form).double()
    theirs = saelens.to_saelens(ours)
    x = x.double() * 3  # past the clip, into the tail
    norms = ours.W_dec.detach().norm(dim=1).clone()
    with torch.no_grad():
        z, x_hat = theirs.encode(x).clone(), theirs(x).clone()
        theirs.fold_W_dec_norm()
        assert torch.allclose(theirs.W_dec.norm(dim=1), torch.ones(D_SAE).double())
        assert torch.equal(theirs.encode(x) != 0, z != 0)
        assert torch.allclose(theirs.encode(x), z * norms, rtol=1e-6, atol=1e-6)
        assert torch.allclose(theirs(x), x_hat, rtol=1e-6, atol=1e-6)
    theirs.to(dtype=torch.float32).save_model(tmp_path)  # per-feature scales survive the files
    for again in (SAE.load_from_disk(tmp_path), FusedRationalSAE.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.allclose(again(x.float()), x_hat.float(), atol=1e-4)


def test_folding_on_loading(tmp_path, x):
    ours = rsae("direct per feature")
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        folded = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
        assert torch.allclose(folded(x), ours(x), atol=1e-5)


def test_folding_of_scale_and_whitening(x):
    ours, mean = rsae("gated"), torch.randn(D_IN)
    matrix = torch.randn(D_IN, D_IN, dtype=torch.float64)
    with torch.no_grad():
        theirs = saelens.to_saelens(rsae("gated"))
        theirs.fold_activation_norm_scaling_factor(3.0)
        assert torch.allclose(theirs.encode(x), ours.encode(3 * x), atol=1e-4)
        theirs = saelens.to_saelens(rsae("gated"))
        theirs.fold_activation_whitening(mean.double(), matrix, matrix.inverse())
        white = ((x.double() - mean) @ matrix).float()
        assert torch.allclose(theirs.encode(x), ours.encode(white), atol=1e-3)


def test_rounds_see_hooks_and_refuse_what_they_cannot_fold(x):
    ours = rsae("three rounds")
    theirs = saelens.to_saelens(ours)
    with torch.no_grad():
        plain = theirs.encode(x).clone()
        theirs.add_hook("hook_sae_acts_pre", lambda value, hook: value)
        assert torch.allclose(theirs.encode(x), plain, atol=1e-5)
        theirs.reset_hooks()
        theirs.add_hook("hook_sae_acts_pre", lambda value, hook: torch.full_like(value, -9.0))
        assert not theirs.encode(x).any()
        theirs.reset_hooks()
        theirs.fold_activation_norm_scaling_factor(3.0)
        assert torch.allclose(theirs.encode(x), ours.encode(3 * x), atol=1e-3)
    eye = torch.eye(D_IN, dtype=torch.float64)
    with pytest.raises(ConfigError, match="whitening"):
        theirs.fold_activation_whitening(torch.zeros(D_IN, dtype=torch.float64), eye, eye)
    config = saelens.RationalTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, rounds=2)
    with pytest.raises(ConfigError, match="one round"):
        saelens.RationalTrainingSAE(config)


def test_low_precision_warns_that_the_gate_was_rounded(tmp_path, x):
    rsae().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="rounds thresholds"):
        low = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert low.W_enc.dtype == torch.bfloat16
    assert low.gate.alpha.dtype == torch.float32
    exact = SAE.load_from_disk(tmp_path, dtype="float32").to(dtype=torch.bfloat16)
    assert torch.equal(exact.gate.threshold, rsae().gate.threshold)
    assert exact.encode(x.bfloat16()).dtype == torch.bfloat16


def test_saes_that_saelens_cannot_compute_are_not_converted():
    with pytest.raises(ConfigError, match="rational_topk"):
        saelens.to_saelens(TopKRationalSAE(D_IN, D_SAE, k=4, gate=rsae().gate))


# -- splicing


@torch.no_grad()
def test_spliced_into_a_hooked_transformer(model):
    tokens, ours = torch.randint(0, 50, (3, 12)), rsae()
    theirs = saelens.to_saelens(ours)
    clean = model(tokens)
    spliced = model.run_with_saes(tokens, saes=[theirs])
    hook = (ours.metadata["hook_name"], lambda value, hook: ours(value))
    assert torch.allclose(spliced, model.run_with_hooks(tokens, fwd_hooks=[hook]), atol=1e-4)
    assert (spliced - clean).abs().max() > 1e-2
    with splice(model, ours):  # our own context, on a HookedTransformer
        assert torch.allclose(model(tokens), spliced, atol=1e-4)
    assert torch.allclose(model.run_with_saes(tokens, saes=[theirs], use_error_term=True), clean, atol=1e-4)
    assert torch.equal(model(tokens), clean)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[theirs])
    codes, seen = (cache[f"blocks.1.hook_resid_post.hook_sae_{name}"] for name in ("acts_post", "input"))
    assert torch.equal(codes != 0, ours.encode(seen) != 0)


@torch.no_grad()
def test_spliced_into_a_transformer_bridge(tmp_path):
    """The same logits as from our own splicing of the Hugging Face model behind it."""
    host = llama()
    model = bridge(host, tmp_path, SAETransformerBridge)
    tokens, ours = torch.randint(0, 50, (3, 12)), rsae(d_in=D_MODEL)
    theirs = saelens.to_saelens(ours)
    clean = model(tokens)
    with splice(host, ours):
        expected = host(tokens).logits
    assert (expected - clean).abs().max() > 1e-2
    assert torch.allclose(model.run_with_saes(tokens, saes=[theirs]), expected, atol=1e-4)
    assert torch.allclose(model.run_with_saes(tokens, saes=[theirs], use_error_term=True), clean, atol=1e-4)
    with model.saes([theirs]):
        assert torch.allclose(model(tokens), expected, atol=1e-4)
    assert torch.equal(model(tokens), clean)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[theirs])
    seen, codes = (cache[model.get_sae_hook_name(theirs, f"hook_sae_{name}")] for name in ("input", "acts_post"))
    assert torch.equal(codes != 0, ours.encode(seen) != 0)
    with splice(model, ours):
        assert torch.allclose(model(tokens), expected, atol=1e-4)


@torch.no_grad()
def test_evals_over_a_bridge_take_only_the_names_without_aliases(tmp_path):
    """SAELens 6.54 measures nothing under blocks.L.hook_resid_post, silently; mended, docs/formats.md may say less."""
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    host, tokens = llama(), torch.randint(0, 50, (3, 12))
    model, theirs = bridge(host, tmp_path, SAETransformerBridge), saelens.to_saelens(rsae(d_in=D_MODEL))

    def delta_ce(hook_name):
        found = get_recons_loss(theirs, model, ActivationScaler(), tokens, False, True, hook_name=hook_name)
        return float((found["ce_loss_with_sae"] - found["ce_loss_without_sae"]).mean())

    assert delta_ce("blocks.1.hook_resid_post") == 0
    with splice(host, saelens.from_saelens(theirs)):
        spliced = host(tokens, labels=tokens).loss
    assert delta_ce("blocks.1.hook_out") == pytest.approx(float(spliced - host(tokens, labels=tokens).loss), abs=1e-4)


def test_error_term_gives_the_code_gradients(tmp_path):
    model, theirs = bridge(llama(), tmp_path, SAETransformerBridge), saelens.to_saelens(rsae(d_in=D_MODEL))
    model.run_with_saes(torch.arange(12)[None], saes=[theirs], use_error_term=True)[0, -1].max().backward()
    assert theirs.W_dec.grad.abs().sum() > 0
    assert theirs.gate.threshold.grad.abs().sum() > 0


# -- evals and training


def test_evals_give_the_l0_of_our_own_code(model, store, text):
    from sae_lens import run_evals
    from sae_lens.evals import EvalConfig
    from sae_lens.training.activation_scaler import ActivationScaler

    ours = rsae()
    theirs = saelens.to_saelens(ours)
    metrics, _ = run_evals(
        theirs,
        store(theirs),
        model,
        activation_scaler=ActivationScaler(),
        eval_config=EvalConfig(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=8,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
    )
    rows = torch.tensor(text()["tokens"][:])
    _, cache = model.run_with_cache(rows, names_filter=ours.metadata["hook_name"])
    with torch.no_grad():
        l0 = (ours.encode(cache[ours.metadata["hook_name"]]) != 0).float().sum(-1).mean()
    assert metrics["sparsity"]["l0"] == pytest.approx(float(l0), rel=1e-4)
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0


def test_the_training_runner(tmp_path, model, text):
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

    torch.manual_seed(0)
    config = LanguageModelSAERunnerConfig(
        sae=saelens.RationalTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l0_coefficient=0.1, decoder_init_norm=1.0),
        model_name="tiny",
        hook_name="blocks.1.hook_resid_post",
        dataset_path="none",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=16,
        training_tokens=20_000,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=32,
        lr=1e-2,
        feature_sampling_window=1000,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(tmp_path / "trained"),
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = LanguageModelSAETrainingRunner(config, override_dataset=text(512), override_model=model)
    before = runner.sae.gate.threshold.detach().clone()
    runner.run()
    assert not torch.equal(runner.sae.gate.threshold, before)
    trained = SAE.load_from_disk(tmp_path / "trained")
    assert isinstance(trained, saelens.RationalSAE)
    assert trained.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    rows = torch.randint(1, 50, (16, 16))
    _, cache = model.run_with_cache(rows, names_filter="blocks.1.hook_resid_post")
    x = cache["blocks.1.hook_resid_post"][:, 1:].flatten(0, 1)
    with torch.no_grad():
        ours = FusedRationalSAE.from_pretrained(tmp_path / "trained")
        assert torch.allclose(ours(x), trained(x), atol=1e-4)
        fvu = (x - ours(x)).square().sum() / (x - x.mean(0)).square().sum()
        l0 = (ours.encode(x) != 0).float().sum(-1).mean()
    assert fvu < 0.2
    assert l0 < 16  # without a penalty it stays above half of the features


def test_training_goes_on_from_an_upgraded_sae(tmp_path, x):
    ours = rsae()
    ours.save_pretrained(tmp_path / "upgraded")
    training = TrainingSAE.load_from_disk(tmp_path / "upgraded")
    assert isinstance(training, saelens.RationalTrainingSAE)
    with torch.no_grad():
        assert torch.allclose(training.encode(x), ours.encode(x), atol=1e-5)
    training.save_inference_model(tmp_path / "back")
    assert torch.equal(FusedRationalSAE.from_pretrained(tmp_path / "back").encode(x), ours.encode(x))
    assert torch.equal(saelens.from_saelens(training).encode(x), ours.encode(x))


def test_the_penalties_are_those_of_the_shipped_code(x):
    from sae_lens.saes.sae import TrainStepInput

    ours = rsae()
    training = saelens.RationalTrainingSAE(
        saelens.RationalTrainingSAEConfig.from_dict({**ours.config(), "l0_coefficient": 2.0, "l1_coefficient": 3.0})
    )
    training.load_state_dict(ours.state_dict())
    rows = x.flatten(0, 1)
    step = TrainStepInput(rows, {"l0": 2.0, "l1": 3.0}, None, 0, False)
    out = training.training_forward_pass(step)
    z = ours.encode(rows)
    assert float(out.losses["l0_loss"]) == pytest.approx(2 * float((z != 0).float().sum(1).mean()), rel=1e-5)
    l1 = (z.abs() * ours.W_dec.norm(dim=1)).sum(1).mean()
    assert float(out.losses["l1_loss"]) == pytest.approx(3 * float(l1), rel=1e-5)
    out.loss.backward()
    assert training.gate.threshold.grad.abs().sum() > 0


@pytest.mark.parametrize(("found", "error"), [("6.99.0", None), ("7.0.0", SourceError), ("5.11.0", SourceError)])
def test_untested_saelens_versions_give_a_warning_or_an_error(monkeypatch, found, error):
    monkeypatch.setattr(saelens, "version", lambda _: found)
    if error is None:
        with pytest.warns(UserWarning, match=r"tested with sae-lens 6\.54; this is 6\.99"):
            saelens.check_version()
    else:
        with pytest.raises(error, match=r"sae-lens==6\.54"):
            saelens.check_version()


def test_the_configuration_is_what_saelens_writes_itself(tmp_path):
    """Field by field, but for what is ours alone, and the README."""
    rsae().save_pretrained(tmp_path / "ours")
    SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "cfg.json").read_text()) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"metadata"}
    assert sae_lens.__version__.startswith(saelens.TESTED)
