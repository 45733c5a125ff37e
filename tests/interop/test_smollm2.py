"""The whole way on a real model: an upgraded SAE of SmolLM2 costs it the same in SAELens as in `rsae eval`."""

import pytest
import torch

pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-interop")
from sae_lens import SAE, SAETransformerBridge
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler

import rsae_triton.integrations.saelens  # noqa: F401  (registers the architecture)
from rsae_triton import FusedRationalSAE, load_host, train, upgrade
from rsae_triton.activations import extract_splits, load_corpus
from rsae_triton.activations.loading import find_model
from rsae_triton.commands.evaluate import Eval, run_eval
from rsae_triton.common.errors import SourceError
from rsae_triton.evaluation.held_out import load_saes, open_held_out, open_host
from rsae_triton.experiments.teach import TeacherPlan, make_teacher
from rsae_triton.integrations import splice

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """The folder of a small SAE of blocks.16.hook_resid_pre: trained, upgraded, trained on, saved."""
    try:
        host = load_host("smollm2", dtype="float32", device="cpu")
        documents = load_corpus("demo")
    except SourceError as error:
        pytest.skip(f"the demo's files cannot be fetched: {error}")
    splits = extract_splits(host, documents, n_train=6_000, n_validation=400, n_test=400)
    teacher = make_teacher(TeacherPlan("relu", 512, steps=100), splits, splits.train.tensor())[0]
    teacher.metadata.update(model_name=host.name, hook_name=host.default_hook, activation_scale=splits.train.scale)
    rsae = upgrade(teacher, splits.train)
    train(rsae, splits.train, steps=20, progress=False)
    folder = tmp_path_factory.mktemp("upgraded") / "rsae"
    return rsae.save_pretrained(folder)


@torch.no_grad()
def test_delta_ce_in_saelens_is_that_of_rsae_eval(upgraded, capsys):
    options = Eval(paths=(upgraded,), tokens=500, sequences=4, dtype="float32")
    ours = run_eval(options)["saes"]["rsae"]

    saes = load_saes([upgraded])
    host = open_host(options, saes)
    held_out = open_held_out(options, saes, host)
    sequences = held_out.store.sequences
    tokens, counted = sequences.tokens[:4].long(), sequences.counted[:4]
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
        print(f"\ndelta_ce of {len(tokens)} sequences: rsae eval {ours['delta_ce']:.6f}, SAELens {delta_ce:.6f}")
    assert ours["delta_ce"] > 0.05
    assert delta_ce == pytest.approx(ours["delta_ce"], abs=1e-4)

    # Spliced in everywhere, BOS too: our contexts and SAELens' give the same logits.
    spliced = model.run_with_saes(tokens[:2], saes=[theirs])
    for one in (model, host.model):
        with splice(one, FusedRationalSAE.from_pretrained(upgraded)):
            logits = one(tokens[:2])
        assert torch.allclose(getattr(logits, "logits", logits), spliced, atol=1e-3)
