"""The whole way on a real model: an upgraded SAE of SmolLM2 costs it the same in SAELens as in `rsae eval`."""

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-interop")
from sae_lens import SAE, SAETransformerBridge
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler

import rsae_triton.integrations.saelens  # noqa: F401  (registers the architecture)
from rsae_triton import FusedRationalSAE
from rsae_triton.activations import fetch
from rsae_triton.activations.loading import find_model
from rsae_triton.cli import main
from rsae_triton.errors import SourceError
from rsae_triton.evaluate.commands import Eval, run_eval
from rsae_triton.evaluate.held_out import load_saes, open_held_out, open_host
from rsae_triton.integrations import splice

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """What `rsae demo --quick` upgrades: 512 features at blocks.16.hook_resid_pre."""
    try:
        fetch("smollm2")
    except SourceError as error:
        pytest.skip(f"the demo's files cannot be fetched: {error}")
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out / "rsae"


@torch.no_grad()
def test_delta_ce_in_saelens_is_that_of_rsae_eval(upgraded, capsys):
    options = Eval(paths=(upgraded,), tokens=800, sequences=8, dtype="float32")
    ours = run_eval(options)["saes"]["rsae"]

    saes = load_saes([upgraded])
    host = open_host(options, saes)
    held_out = open_held_out(options, saes, host)
    sequences = held_out.store.sequences
    tokens, counted = sequences.tokens[:8].long(), sequences.counted[:8]
    model = SAETransformerBridge.boot_transformers(find_model("smollm2")[0], dtype=torch.float32, device="cpu")
    theirs = SAE.load_from_disk(upgraded)
    name = model._resolve_hook_name(theirs.cfg.metadata.hook_name)  # its evals take no alias from a bridge
    found = get_recons_loss(
        theirs, model, ActivationScaler(), tokens, False, True, ignore_tokens=[host.bos_token_id], hook_name=name
    )
    # rsae eval leaves BOS as it is, and what is as long as it; here that is BOS alone.
    norms = host.residual(tokens).norm(dim=-1)
    assert torch.equal(norms > held_out.splice.norm_limit, tokens == host.bos_token_id)
    difference = (found["ce_loss_with_sae"] - found["ce_loss_without_sae"]).double() * counted
    delta_ce = float((difference.sum(1) / counted.sum(1)).mean())
    with capsys.disabled():
        print(f"\ndelta_ce of 8 sequences: rsae eval {ours['delta_ce']:.6f}, SAELens {delta_ce:.6f}")
    assert ours["delta_ce"] > 0.05
    assert delta_ce == pytest.approx(ours["delta_ce"], abs=1e-4)

    # Spliced in everywhere, BOS too: our contexts and SAELens' give the same logits.
    spliced = model.run_with_saes(tokens[:2], saes=[theirs])
    for one in (model, host.model):
        with splice(one, FusedRationalSAE.from_pretrained(upgraded)):
            logits = one(tokens[:2])
        assert torch.allclose(getattr(logits, "logits", logits), spliced, atol=1e-3)
