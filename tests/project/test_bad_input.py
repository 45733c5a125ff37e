"""Bad input at every public door: the right error, a message that names the argument, and nothing written or lost."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from bad_jobs import JOBS, make_files
from bad_odd import ODD
from bad_python import RELU, X, sae
from bad_python import TABLE as OBJECTS

from rsae_triton import encode_sparse
from rsae_triton.commands import cli
from rsae_triton.commands.cli import main
from rsae_triton.common.checks import parse_device
from rsae_triton.common.errors import ConfigError, RsaeError
from rsae_triton.teachers import BatchTopKSAE, JumpReluSAE, ReluSAE, TopKSAE

TABLE = [*OBJECTS, *JOBS, *ODD]
BEFORE = {name: one.clone() for name, one in RELU.state_dict().items()}


def everything(folder):
    """Path -> bytes of all that is in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    at = tmp_path_factory.mktemp("files")
    make_files(at)
    return at


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE])
def test_python(files, call, error, message):
    before = everything(files)
    with pytest.raises(error) as caught:
        call(files)
    assert isinstance(caught.value, RsaeError)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text.strip()
    assert everything(files) == before
    assert all(torch.equal(one, BEFORE[name]) for name, one in RELU.state_dict().items())


# -- the command line. {at} is a folder with good/ (a Rational SAE), empty/ and text.json; {new} must not come to be.

COMMANDS = [
    ("", "Missing subcommand"),
    ("nope", "nope"),
    ("demo --tokens x", "--tokens"),
    ("demo --tokens 0", "--tokens is 0"),
    ("demo --tokens 100", "--tokens 100"),
    ("demo --recipe x", "--recipe"),
    ("demo --degree x", "degree is 'x'"),
    ("demo --degree 99,9", "99"),
    ("demo --device x", "device 'x'"),
    ("demo --d-sae 0", "--d-sae is 0"),
    ("demo --sequences 1", "--sequences is 1"),
    ("demo --text {at}/nowhere", "{at}/nowhere"),
    ("demo --text", "--text is empty"),
    ("demo --teacher {at}/nowhere", "{at}/nowhere"),
    ("demo --teacher {at}/empty", "empty"),
    ("demo --model {at}/nowhere", "{at}/nowhere"),
    ("demo --out {at}/text.json/out", "text.json/out"),
    ("demo --nonsense", "--nonsense"),
    ("eval", "no SAE"),
    ("eval {at}/nowhere", "{at}/nowhere"),
    ("eval {at}/empty", "empty"),
    ("eval {at}/good --tokens 0", "--tokens is 0"),
    ("eval {at}/good --sequences 1", "--sequences is 1"),
    ("eval {at}/good --out {at}", "--out {at} is a folder"),
    ("eval {at}/good --out {at}/text.json/x", "--out {at}/text.json/x"),
    ("eval {at}/good {at}/good", "twice"),
    ("eval {at}/good --dtype x", "dtype 'x'"),
    ("eval {at}/good --device x", "device 'x'"),
    ("eval {at}/good --model {at}/nowhere", "nowhere"),
    ("eval {at}/good --text {at}/nowhere", "nowhere"),
    ("match", "the reference"),
    ("match {at}/nowhere {at}/good", "nowhere"),
    ("match {at}/good {at}/good", "twice"),
    ("match {at}/good {at}/empty --changed -1", "--changed is -1"),
    ("match {at}/good {at}/empty --tokens 1", "--tokens is 1"),
    ("probe", "no SAE"),
    ("probe {at}/nowhere", "nowhere"),
    ("probe {at}/good --items 1", "--items 1"),
    ("probe {at}/good --context 1", "--context 1"),
    ("probe {at}/good --tasks nope", "'nope'"),
    ("probe {at}/good --text x", "--label"),
    ("probe {at}/good --label x", "--text"),
    ("probe {at}/good --text {at}/nowhere --label y", "nowhere"),
    ("probe {at}/good --out {at}", "--out"),
    ("absorption", "no SAE"),
    ("absorption {at}/good --per-letter 3", "--per-letter"),
    ("teach", "Nonlinearity of the teacher"),
    ("teach x --out {new}", "relu"),
    ("teach relu", "--out"),
    ("teach relu --out {new} --tokens 0", "--tokens is 0"),
    ("teach relu --out {new} --steps 0", "--steps is 0"),
    ("teach relu --out {new} --batch-size 0", "--batch-size is 0"),
    ("teach relu --out {new} --d-sae 0", "--d-sae is 0"),
    ("teach relu --out {new} --weight -1", "--weight is -1"),
    ("teach relu --out {new} --weight nan", "--weight is nan"),
    ("teach relu --out {new} --penalty tanh", "penalty"),
    ("teach topk --out {new} --k 0", "--k is 0"),
    ("teach topk --out {new} --k 9999", "--k is 9999"),
    ("teach relu --out {new} --model {at}/nowhere", "nowhere"),
    ("teach relu --out {new} --text {at}/nowhere", "nowhere"),
    ("teach relu --out {new} --device x", "device 'x'"),
    ("teach relu --out {at}/text.json/x", "text.json"),
    ("sweep --out {new} --teachers", "--teachers is empty"),
    ("sweep --out {new} --teachers x", "--teachers x"),
    ("sweep --out {new} --contenders x", "contender is 'x'; choose from rsae"),
    ("sweep --out {new} --tokens 0", "--tokens is 0"),
    ("sweep --out {new} --batch-size 0", "--batch-size is 0"),
    ("sweep --out {new} --split x", "--split"),
    ("sweep --out {new} --sequences 1", "--sequences is 1"),
    ("sweep --out {new} --sparsities 0", "--sparsities is 0"),
    ("sweep --out {new} --sparsities nan", "--sparsities is nan"),
    ("sweep --out {new} --widths 0", "--widths is 0"),
    ("sweep --out {new} --model {at}/nowhere", "nowhere"),
    ("reproduce --out {new} --host x", "--host is 'x'"),
    ("reproduce --out {new} --hosts {at}/nowhere", "nowhere"),
    ("reproduce --out {new} --hosts {at}", "--hosts"),
    ("reproduce --out {new} --seeds 99", "99"),
    ("reproduce --out {new} --seeds x", "--seeds"),
    ("doctor --nonsense", "--nonsense"),
    ("upgrade", "--activations"),
    ("upgrade {at}/good --activations {at}/nowhere --out {new}", "nowhere"),
    ("upgrade {at}/good --activations {at}/empty --out {new}", "manifest.json"),
    ("upgrade {at}/good --activations {at}/empty --out {new} --degree x", "degree is 'x'"),
    ("upgrade {at}/good --activations {at}/empty --out {new} --coefficients some", "coefficients is 'some'"),
    ("upgrade {at}/good --activations {at}/empty --out {at}/text.json/x", "text.json"),
    ("train", "--steps"),
    ("train {at}/good --activations {at}/empty --out {new} --steps x", "--steps"),
    ("train {at}/good --activations {at}/empty --out {new} --steps -1", "steps is -1"),
    ("train {at}/good --activations {at}/empty --out {new} --steps 1 --batch-size 0", "batch_size is 0"),
    ("train {at}/good --activations {at}/empty --out {new} --steps 1 --lr nan", "lr is nan"),
    ("train {at}/good --activations {at}/empty --out {new} --steps 1 --keep 0", "keep is 0"),
    ("train {at}/good --activations {at}/empty --out {new} --steps 1 --device x", "device 'x'"),
    ("train {at}/good --activations {at}/empty --out {new} --steps 1", "manifest.json"),
    ("train {at}/good --activations {at}/empty --out {new} --steps 1 --features-over 2", "torchrun"),
    ("train {at}/good --activations {at}/store --out {new} --steps 1 --batch-size 17", "16 tokens are fewer"),
    ("train {at}/good --activations {at}/store --out {new} --steps 1 --target-l0 9", "target_l0 is 9; there are 8"),
    ("train {at}/good --activations {at}/store --out {new} --steps 1 --lr 1e999", "lr is inf"),
    ("train {at}/good --activations {at}/store --out {new} --steps 1 --seed {nines}", "seed"),
    ("train {at}/good --activations {at}/store --out {new} --steps 1 --accumulate 999", "accumulate=999"),
    ("train {at}/good --activations {at}/store --out {new} --steps 1 --features-over 0", "--features-over is 0"),
    (
        "train {at}/good --activations {at}/store --out {at}/text.json --steps 1 --batch-size 8",
        "text.json/checkpoints cannot be written to",
    ),
    ("train {at}/flag --activations {at}/store --out {new} --steps 1", "apply_b_dec_to_input is 'no'"),
    ("train {at}/float8 --activations {at}/store --out {new} --steps 1", "dtype is torch.float8_e4m3fn"),
    ("upgrade {at}/good --activations {at}/store --out {new}", "a FusedRationalSAE cannot be upgraded"),
    ("upgrade {at}/good --activations {at}/loop --out {new}", "loop holds no manifest.json"),
    ("upgrade {at}/good --activations {at}/store --out {at}/loop", "loop cannot be written to"),
    ("upgrade {at}/good --activations {at}/store --out {new} --coefficients {nines}", "coefficients is '9999"),
    ("upgrade {at}/good --activations {at}/store --out {new} --degree {nines},1", "degree is '9999"),
    ("upgrade {at}/good --activations {at}/store --out {new} --degree 3.7,2", "degree is '3.7,2'"),
    ("eval {at}/loop", "loop does not exist"),
    ("eval ~nosuchuser/x", "~nosuchuser/x does not exist"),
    ("eval {at}/good --model ~nosuchuser/x", "~nosuchuser/x"),
    ("eval {at}/good --seed {nines}", "--seed"),
    ("eval {at}/good --seed -99999999999999999999", "seed is -99999999999999999999"),
    ("eval {at}/seed --text {at}/some.txt --model {at}/empty", "config.json"),
    ('eval {at}/good --text ""', "--text is empty"),
    ("eval {at}/nowhere --out {new}/x.json", "nowhere does not exist"),
    ("match {at}/good {at}/loop", "loop does not exist"),
    ("match {at}/good {at}/loop --seed 99999999999999999999", "seed is 99999999999999999999"),
    ("probe {at}/good --seed 99999999999999999999", "seed is 99999999999999999999"),
    ("probe {at}/good --text {at}/deep.jsonl --label y", "deep.jsonl line 1"),
    ("teach relu --out {new} --seed 99999999999999999999", "seed is 99999999999999999999"),
    ("teach relu --out {at}/loop", "loop cannot be written to"),
    ("sweep --out {new} --seeds 99999999999999999999", "seed is 99999999999999999999"),
    ("sweep --out {at}/text.json", "text.json cannot be written to"),
    ("reproduce --out {at}/text.json", "text.json cannot be written to"),
    ('demo --out {new} --text ""', "--text is empty"),
    ("demo --out {at}/loop", "loop cannot be written to"),
    ("extract --seed 99999999999999999999", "seed is 99999999999999999999"),
    ("extract --root {at}/text.json", "text.json cannot be written to"),
    ("gates fit step --degree 3,2 --margin 1e-300", "margin=1e-300"),
    ("gates fit relu --degree 3,2 --plot {new}", "has no suffix"),
    ("gates fit relu --degree 3,2 --samples {at}/good/sae_weights.safetensors", "sae_weights.safetensors"),
    ("export {at}/nowhere --out {new}", "holds no checkpoint"),
    ("export {at}/empty --out {new}", "holds no checkpoint"),
    ("extract --tokens 0", "--tokens is 0"),
    ("extract --context 1", "--context is 1"),
    ("extract --drop-outliers 0.5", "--drop-outliers is 0.5"),
    ("extract --text {at}/nowhere", "nowhere"),
    ("extract --model {at}/nowhere", "nowhere"),
    ("extract --dtype x", "--dtype"),
    ("extract --hook-out blocks.1.hook_mlp_out", "--hook-out needs one --hook"),
    ("extract --max-documents 0", "--max-documents is 0"),
    ("bench --keep", "--new"),
    ("bench --new {at}/nowhere", "nowhere"),
    ("bench --new {at}/text.json", "text.json"),
    ("bench --results {at}/empty", "empty has no speed-NAME.json"),
    ("plan", "--d-in"),
    ("plan --d-in 4", "--d-sae"),
    ("plan --d-in 0 --d-sae 8", "--d-in is 0"),
    ("plan --d-in 4 --d-sae 99999999999999999999", "--d-sae is 99999999999999999999"),
    ("plan --d-in 4 --d-sae 8 --tokens -1", "--tokens is -1"),
    ("plan --d-in 4 --d-sae 8 --gpus 0", "--gpus is 0"),
    ("plan --d-in 4 --d-sae 8 --gpus 100000000000", "--gpus is 100000000000"),
    ("plan --d-in 4 --d-sae 8 --gpus 7 --tokens 8", "7 GPUs"),
    ("plan --d-in 4 --d-sae 8 --device T4", "--device"),
    ("plan --d-in 4 --d-sae 8 --degree x", "'x'"),
    ("plan --d-in 4 --d-sae 8 --degree 99,9", "'99,9'"),
    ("plan --d-in 4 --d-sae 8 --degree -1,2", "'-1,2'"),
    ("gates", "subcommand"),
    ("gates fit", "{{relu,step,jumprelu,ramp}}"),
    ("gates fit x", "relu"),
    ("gates fit relu --degree x", "degree"),
    ("gates fit relu --degree 13,2", "13,2"),
    ("gates fit relu --theta 0.1", "theta"),
    ("gates fit relu --theta nan", "theta is nan"),
    ("gates fit jumprelu --theta 0.1", "margin"),
    ("gates fit jumprelu --theta 0.1 --margin 1", "margin=1"),
    ("gates fit relu --method x", "--method"),
    ("gates fit relu --points 3", "points is 3"),
    ("gates fit relu --points 99999999999", "points is 99999999999"),
    ("gates fit relu --tol 0", "tol is 0"),
    ("gates fit relu --samples {at}/nowhere", "nowhere"),
    ("gates fit relu --samples {at}/text.json", "text.json"),
    ("gates fit relu --degree 3,2 --out {at}/text.json/x", "text.json"),
    ("gates fit relu --degree 3,2 --out {at}", "cannot be written"),
    ("gates fit relu --degree 3,2 --plot {new}.xyz", ".xyz"),
    ("gates show --path {at}/nowhere", "nowhere"),
    ("gates show --path {at}/text.json", "text.json"),
    ("gates rebuild --out", "--out"),
]


@pytest.mark.parametrize(("command", "message"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_command_line(files, tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    (files / "text.json").write_text("{}")
    (files / "deep.jsonl").write_text("[" * 5000)
    (files / "loop").is_symlink() or (files / "loop").symlink_to("loop")
    places = {"at": str(files), "new": str(tmp_path / "new"), "nines": "9" * 5000}
    before = everything(files)
    try:
        status = main(shlex.split(command.format(**places)))
    except SystemExit as exit_:  # tyro's, of what it cannot parse
        status = exit_.code
    shown = capsys.readouterr()
    assert status == 2, shown
    text = shown.err + shown.out
    assert message.format(**places) in " ".join(text.split()), text
    assert "Traceback" not in text
    assert everything(files) == before
    assert not list(tmp_path.glob("new*"))
    assert not everything(tmp_path)


def test_the_tables_are_as_long_as_they_are_said_to_be():
    """docs/reliability.md gives these numbers."""
    assert len(TABLE) + len(COMMANDS) >= 120
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert f"{len(TABLE)} bad arguments" in text
    assert f"{len(COMMANDS)} bad command lines" in text


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        MemoryError(),
        PermissionError(13, "denied"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_the_machine_refuses_takes_one_line_too(error, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr(cli, "run", refuse)
    assert main(["demo"]) == 2
    shown = capsys.readouterr().err
    assert len(shown.strip().splitlines()) == 1
    assert shown.startswith("rsae: ")
    with pytest.raises(type(error)):
        main(["demo", "--debug"])


def test_a_bug_is_not_taken_for_the_machine(monkeypatch):
    def refuse(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(cli, "run", refuse)
    with pytest.raises(RuntimeError):
        main(["demo"])


@pytest.mark.parametrize(("said", "shown"), [("", "RuntimeError"), (" \n", "RuntimeError"), ("one\ntwo", "one")])
def test_an_empty_error_of_a_library_is_reported_by_its_type(said, shown, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ConfigError, match=rf"device 'cpu' cannot be used \({shown}\)"):
        parse_device("cpu")


# -- what looks bad and is not


def every_sae():
    sizes = (4, 8)
    yield "rational gated", sae(generator=torch.Generator().manual_seed(3))
    yield "rational direct", sae(form="direct", degree=(5, 4))
    yield "layer norm", sae(normalize_activations="layer_norm")
    yield "relu", ReluSAE(*sizes)
    yield "jumprelu", JumpReluSAE(*sizes)
    yield "topk", TopKSAE(*sizes, k=2)
    yield "batchtopk", BatchTopKSAE(*sizes, k=2)


SAES = list(every_sae())


@pytest.mark.parametrize("one", [one for _, one in SAES], ids=[name for name, _ in SAES])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_empty_batches_give_empty_results_and_zero_gradients(one, shape):
    one.zero_grad(set_to_none=True)
    x = torch.zeros(shape, requires_grad=True)
    z, counts = one.encode_with_counts(x)
    x_hat = one.decode(z, x)
    assert z.shape == (*shape[:-1], 8)
    assert x_hat.shape == shape
    assert counts.tolist() == [0] * 8
    (x_hat.sum() + z.sum()).backward()
    assert x.grad.shape == shape
    for name, parameter in one.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    code = encode_sparse(one, x.detach())
    assert code.values.shape[:-1] == shape[:-1]
    assert code.to_dense(8).shape == z.shape


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_an_empty_batch_on_every_backend(backend):
    one = sae()
    one.backend = backend
    result = one.autoencode(torch.zeros(0, 4), l0_weight=0.1)
    result.total.backward()
    assert float(result.total.detach()) == 0
    assert result.x_hat.shape == (0, 4)
    assert all(p.grad is None or not p.grad.any() for p in one.parameters())


@pytest.mark.parametrize("one", [one for _, one in SAES], ids=[name for name, _ in SAES])
def test_strided_input_is_handled(one):
    dense = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(4))
    expected = one(dense)
    for strided in (
        dense.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([dense, dense], -1)[..., 0],
        dense.flip(0).flip(0),
    ):
        assert torch.allclose(one(strided), expected, atol=1e-6)
    assert torch.allclose(one(dense[:1].expand(6, 5, 4))[3], expected[0], atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("form", ["gated", "direct"])
def test_nan_goes_through_to_its_own_token_and_no_other(backend, form):
    """Encoding does not look for NaN (it would make a GPU wait), and does not hide it either."""
    one = sae(form=form, generator=torch.Generator().manual_seed(5))
    one.backend = backend
    clean = one(X)
    x = X.clone()
    x[3, 1] = float("nan")
    x_hat = one(x)
    assert x_hat[3].isnan().all()
    others = torch.arange(len(X)) != 3
    assert torch.equal(x_hat[others], clean[others])
