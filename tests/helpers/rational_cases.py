"""Small Rational SAEs of every form, with random weights: nothing left out or transposed can go unnoticed."""

import torch

from rsae_triton import FusedRationalSAE, RationalGate, fit_gate
from rsae_triton.sae.gate import smooth_step

D_IN, D_SAE = 16, 40
FORMS = [
    "gated",
    "direct",
    "direct per feature",
    "gated grouped",
    "groups assigned",
    "free",
    "three rounds",
    "weighed rounds",
]


def rsae(form="gated", d_in=D_IN, **options):
    """An SAE with d_sae=40 and decoder rows of several norms, at blocks.1.hook_resid_post of a model "tiny"."""
    generator = torch.Generator().manual_seed(1)
    if form == "direct per feature":
        thresholds = 0.2 + torch.rand(D_SAE, generator=generator)
        fit = fit_gate("jumprelu", (9, 8), theta=0.1, margin=0.02)
        gate = RationalGate.from_fit(fit, D_SAE, thresholds=thresholds, activity_threshold=0.05)
        sae = FusedRationalSAE(d_in, D_SAE, gate=gate, generator=generator, **options)
    elif form == "groups assigned":
        group_of = torch.randint(0, 3, (D_SAE,), generator=generator)
        made = {"groups": 3, "group_of": group_of, "input_scale": torch.tensor([0.05, 0.2, 0.4]), "threshold": 0.2}
        gate = RationalGate(D_SAE, (2, 2), *smooth_step(), form="gated", backward="rational", **made)
        sae = FusedRationalSAE(d_in, D_SAE, gate=gate, generator=generator, **options)
    else:
        kinds = {
            "gated": {"form": "gated", "backward": "rational"},
            "direct": {"degree": (9, 8)},
            "gated grouped": {"form": "gated", "groups": 8},
            "free": {"degree": (5, 4), "domain": "free"},
            "three rounds": {"form": "gated", "backward": "rational", "rounds": 3},
            "weighed rounds": {"form": "gated", "backward": "rational", "rounds": 2, "weighed": True},
        }
        sae = FusedRationalSAE(d_in, D_SAE, generator=generator, **kinds[form], **options)
        with torch.no_grad():
            if sae.gate.form == "gated":
                sae.gate.threshold.uniform_(0, 0.5, generator=generator)
            if sae.refinement is not None:
                sae.refinement.threshold.uniform_(0, 0.5, generator=generator)
            sae.gate.activity_threshold.fill_(0.05)
    with torch.no_grad():
        for name in ("b_enc", "b_dec"):
            getattr(sae, name).normal_(0, 0.3, generator=generator)
        sae.W_dec.mul_(0.5 + torch.rand(D_SAE, 1, generator=generator))
        if sae.refinement is not None:
            rows = sae.W_dec
            if sae.refinement.weights is not None:
                sae.refinement.weights.uniform_(0.3, 2, generator=generator)
                rows = rows * sae.refinement.weights
            sae.refinement.unit.copy_(1 / rows.square().sum(1))
    sae.metadata.update(hook_name="blocks.1.hook_resid_post", model_name="tiny", prepend_bos=True, context_size=16)
    return sae
