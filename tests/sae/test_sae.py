"""The drop-in module: shapes, dtypes, files, and what it refuses."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from rsae_triton.common.errors import ConfigError, FormatError, NumericsError, ShapeError
from rsae_triton.ops.reference import GateSpec
from rsae_triton.remez import fit_gate
from rsae_triton.sae.gate import RationalGate, smooth_step
from rsae_triton.sae.rational import FusedRationalSAE
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE, load_teacher


def rsae(**options) -> FusedRationalSAE:
    return FusedRationalSAE(16, 32, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_shape(lead):
    sae = rsae()
    x = torch.randn(*lead, 16)
    assert sae.encode(x).shape == (*lead, 32)
    assert sae(x).shape == x.shape


def test_a_direct_gate_starts_as_relu_within_the_fit():
    sae, x = rsae(degree=(9, 8)), torch.randn(64, 16) / 4
    bound = fit_gate("relu", (9, 8)).error
    assert (sae.encode(x) - sae.hidden_pre(x).relu()).abs().max() <= bound + 1e-5


def test_codes_carry_exact_zeros_and_agree_with_the_count():
    sae = rsae(form="gated", backward="rational")
    sae.gate.threshold.data.fill_(0.3)
    x = torch.randn(50, 16)
    z, counts = sae.encode_with_counts(x)
    h = sae.hidden_pre(x)
    assert torch.equal(z != 0, h > 0.3)
    assert torch.equal(counts, (z != 0).sum(0).float())


@pytest.mark.parametrize("groups", [1, 8, 32])
def test_groups_share_coefficients_in_blocks(groups):
    gate = rsae(groups=groups).gate
    with torch.no_grad():
        gate.alpha.copy_(torch.randn(groups, 4))
    h = torch.randn(7, 32)
    z = gate(h, hard=False)
    for feature in (0, 5, 31):
        one = RationalGate(1, (3, 2), gate.numerator()[feature * groups // 32], gate.denominator()[0])
        assert torch.allclose(one(h[:, feature : feature + 1], hard=False), z[:, feature : feature + 1], atol=1e-6)


def test_gate_parameters_stay_float32_in_a_bf16_module():
    sae = rsae(form="gated").to(torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert all(one.dtype == torch.float32 for one in (*sae.gate.parameters(), *sae.gate.buffers()))
    assert sae(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(sae).double().gate.alpha.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_parameters_stay_float32_when_half_precision_weights_are_assigned(dtype):
    made = rsae(form="gated").with_rounds(2, torch.randn(300, 16))
    narrow = {name: one.to(dtype) if one.is_floating_point() else one for name, one in made.state_dict().items()}
    sae = rsae(form="gated").with_rounds(2, torch.randn(300, 16))
    sae.load_state_dict(narrow, assign=True)
    assert sae.W_enc.dtype == dtype
    for part in (sae.gate, sae.refinement):
        for name, one in (*part.named_parameters(), *part.named_buffers()):
            assert one.dtype in (torch.float32, torch.int64), name
    assert sae.gate.threshold.requires_grad
    assert narrow["gate.threshold"].dtype == dtype
    sae(torch.randn(3, 16, dtype=dtype)).float().sum().backward()


def test_autocast_runs_the_matrix_product_low_and_the_gate_high():
    sae, x = rsae(), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        z = sae.encode(x)
    assert z.dtype == torch.bfloat16
    assert torch.allclose(z.float(), sae.encode(x), atol=0.05)
    z.float().sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.dtype == torch.float32


def test_torch_compile_of_the_module():
    sae, x = rsae(), torch.randn(9, 16)
    assert torch.allclose(torch.compile(sae, backend="eager")(x), sae(x), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"form": "gated", "groups": 4, "backward": "rational"}, {"degree": (9, 8)}])
def test_saving_and_loading_changes_no_bit(tmp_path, options):
    sae, x = rsae(**options, metadata={"hook_name": "blocks.3.hook_resid_pre"}), torch.randn(20, 16)
    with torch.no_grad():
        sae.gate.threshold.uniform_(0, 0.2)
        sae.gate.activity_threshold.fill_(0.01)
    sae.save_pretrained(tmp_path / "sae")
    again = FusedRationalSAE.from_pretrained(tmp_path / "sae")
    assert torch.equal(again.encode(x), sae.encode(x))
    assert again.metadata["hook_name"] == "blocks.3.hook_resid_pre"
    assert again.gate.spec() == sae.gate.spec()
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == "rational"
    assert config["metadata"]["sae_lens_version"]


@pytest.mark.parametrize("teacher", [ReluSAE(16, 32), JumpReluSAE(16, 32, threshold=0.2), TopKSAE(16, 32, k=5)])
def test_teachers_load_again(tmp_path, teacher):
    teacher.save_pretrained(tmp_path)
    again = load_teacher(tmp_path)
    x = torch.randn(20, 16)
    assert type(again) is type(teacher)
    assert torch.equal(again(x), teacher(x))


def test_folding_the_scale_keeps_the_code():
    for sae in (rsae(), rsae(apply_b_dec_to_input=False), TopKSAE(16, 32, k=5)):
        with torch.no_grad():
            sae.b_dec.normal_()
            sae.b_enc.normal_()
        x = torch.randn(20, 16).double()
        sae.double()
        folded = copy.deepcopy(sae).fold_activation_scale_(3.0)
        assert torch.allclose(folded.encode(x), sae.encode(3 * x))
        assert torch.allclose(folded(x), sae(3 * x) / 3)


def test_thresholds_of_a_direct_jumprelu_come_from_homogeneity():
    """J_theta(l h) = l J_{theta/l}(h): one shared fit serves every threshold, to the fit's own error."""
    fit, thresholds = fit_gate("jumprelu", (9, 8), theta=0.1, margin=0.02), torch.tensor([0.1, 0.5, 2.0])
    gate = RationalGate.from_fit(fit, 3, thresholds=thresholds)
    h = torch.linspace(-1, 1, 4001)[:, None] * thresholds / 0.1
    outside = (h - thresholds).abs() >= 0.02 * thresholds / 0.1
    error = (gate(h, hard=False) - h * (h > thresholds)).abs() * outside / (thresholds / 0.1)
    assert error.max() <= fit.error * 1.01 + 3e-6


def test_smooth_step_is_flat_at_both_ends():
    a, b = smooth_step()
    gate = RationalGate(1, (2, 2), a, b, form="gated")
    h = torch.tensor([[-1.0], [1.0], [2.0], [-3.0]]).double().requires_grad_()
    z = gate.double()(h, hard=False)
    assert torch.allclose(z.detach().flatten(), torch.tensor([0.0, 1.0, 2.0, 0.0]).double())
    (slope,) = torch.autograd.grad(z.sum(), h)
    assert torch.allclose(slope.flatten(), torch.tensor([0.0, 1.0, 1.0, 0.0]).double())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rsae(groups=5), ConfigError, "groups=5"),
        (lambda: rsae(form="soft"), ConfigError, "form"),
        (lambda: rsae(backend="gpu"), ConfigError, "backend"),
        (lambda: rsae(amplitude="identity"), ConfigError, "amplitude"),
        (lambda: FusedRationalSAE(0, 4), ConfigError, "d_in"),
        (lambda: rsae(degree=(13, 2)), ConfigError, "degree"),
        (lambda: RationalGate(4, (3, 2), [0.0] * 3, [0.0] * 2), ShapeError, "a has shape"),
        (lambda: RationalGate(4, (1, 0), [0.0, float("nan")], []), NumericsError, "NaN"),
        (lambda: RationalGate(4, (1, 0), [0.0, 1.0], [], input_scale=0.0), NumericsError, "input_scale"),
        (lambda: GateSpec(3, True), ConfigError, "denominator degree"),
        (lambda: TopKSAE(4, 8, k=9), ConfigError, "k is 9"),
        (lambda: JumpReluSAE(4, 8, threshold=-1.0), ConfigError, "negative"),
        (lambda: rsae().encode(torch.randn(3, 15)), ShapeError, "d_in=16"),
        (lambda: rsae().decode(torch.randn(3, 15)), ShapeError, "d_sae=32"),
        (lambda: rsae().encode(torch.randn(3, 16).double()), ConfigError, "float64"),
        (lambda: rsae(gate=RationalGate(4, (1, 0), [0.0, 1.0], [])), ConfigError, "d_sae=4"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def damage_config(folder, **changes):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "cfg.json").write_text("{"), "not JSON"),
        (lambda d: (d / "cfg.json").write_text("[]"), "not a JSON object"),
        (lambda d: damage_config(d, architecture="standard"), "not 'rational'"),
        (lambda d: damage_config(d, d_sae=31), "shape"),
        (lambda d: damage_config(d, d_in=10**9, d_sae=10**9), "shape"),
        (lambda d: damage_config(d, input_scale_groups=10**12), "input_scale_groups"),
        (lambda d: damage_config(d, groups=3), "does not divide"),
        (lambda d: damage_config(d, degree=[1, 2, 3]), "misuses"),
        (lambda d: damage_config(d, degree=None), "degree|misuses"),
        (lambda d: (d / "sae_weights.safetensors").write_bytes(b"abc"), "truncated"),
        (lambda d: (d / "sae_weights.safetensors").unlink(), "does not exist"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    rsae(groups=2).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((FormatError, ConfigError), match=message):
        FusedRationalSAE.from_pretrained(tmp_path)


def test_a_bad_weight_is_not_saved_over_a_good_file(tmp_path):
    sae = rsae()
    sae.save_pretrained(tmp_path)
    before = (tmp_path / "sae_weights.safetensors").read_bytes()
    sae.W_enc.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="W_enc"):
        sae.save_pretrained(tmp_path)
    assert (tmp_path / "sae_weights.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "cfg.json", "sae_weights.safetensors"]


def test_settings_we_would_not_reproduce_are_refused(tmp_path):
    ReluSAE(4, 8).save_pretrained(tmp_path)
    damage_config(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(FormatError, match="activation_scale"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_autoencode_is_the_loss_of_encode_and_decode(normalize):
    x = 3 * torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) + 1
    sae = FusedRationalSAE(
        8, 32, form="gated", backward="rational", apply_b_dec_to_input=False, normalize_activations=normalize
    )
    z, counts, l1 = sae.encode_with_sums(x)
    expected = (x - sae.decode(z, x)).square().sum(-1).mean() + 0.2 * counts.sum() / 30
    expected = expected + 0.1 * l1 @ sae.W_dec.norm(dim=1) / 30
    found = sae.autoencode(x, l1_weight=0.1, l0_weight=0.2, chunk_tokens=8)
    assert torch.allclose(found.total, expected, rtol=1e-5)
    assert torch.allclose(found.x_hat, sae(x), rtol=1e-4, atol=1e-5)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    pairs = [torch.autograd.grad(total, parameters, allow_unused=True) for total in (found.total, expected)]
    for name, one, other in zip(names, *pairs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_lies_feature_by_feature_in_memory_and_row_by_row_in_files(tmp_path, dtype):
    sae = FusedRationalSAE(8, 12, dtype=dtype)
    for one in (sae, copy.deepcopy(sae), sae.to(torch.float32)):
        assert one.W_enc.t().is_contiguous()
    sae.encode(torch.randn(5, 8)).sum().backward()
    assert sae.W_enc.grad.stride() == sae.W_enc.stride()
    sae.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")["W_enc"]
    assert stored.is_contiguous()
    assert torch.equal(stored, sae.W_enc)
    loaded = FusedRationalSAE.from_pretrained(tmp_path)
    assert loaded.W_enc.t().is_contiguous()
    assert torch.equal(loaded.W_enc, sae.W_enc)
