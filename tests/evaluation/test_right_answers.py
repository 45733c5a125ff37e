"""What the field got wrong numbers from, without a word: places, BOS, dead SAEs, units of a code, memory."""

import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from synthetic import sparse_activations

from rsae_triton import train, upgrade
from rsae_triton.activations import extract, load_corpus, load_host, store_tensor
from rsae_triton.common.errors import ConfigError, FormatError, NumericsError
from rsae_triton.evaluation import at_l0, compare, evaluate, reconstruction
from rsae_triton.evaluation.downstream import Splice, splice_sequences
from rsae_triton.evaluation.held_out import HostOptions, TextOptions, load_sae, open_held_out, open_host
from rsae_triton.integrations import splice
from rsae_triton.sae.making import making_of
from rsae_triton.teachers import JumpReluSAE, ReluSAE, TopKSAE

CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.saved(tiny_models.gpt2(), tmp_path_factory.mktemp("gpt2"))


def sae(d_in=32, d_sae=64, seed=1, **metadata):
    return ReluSAE(d_in, d_sae, generator=torch.Generator().manual_seed(seed), metadata=metadata)


# -- what an SAE says of its activations


def test_centred_activations_are_what_an_sae_gets_that_says_so(folder, tmp_path):
    options = HostOptions(model=str(folder), dtype="float32")
    tokens = torch.arange(1, 21).view(2, 10)
    place = {"hook_name": "blocks.2.hook_resid_pre"}
    plain, centred = (open_host(options, {"sae": sae(**place, **more)}) for more in ({}, CENTRED))
    assert float(plain.residual(tokens).mean(-1).abs().max()) > 0.03
    assert float(centred.residual(tokens).mean(-1).abs().max()) < 1e-4
    assert torch.allclose(plain.next_token_loss(tokens), centred.next_token_loss(tokens), atol=1e-4)
    with pytest.raises(ConfigError, match="says center_writing_weights=True and the others do not"):
        open_host(options, {"a": sae(**place), "b": sae(**place, **CENTRED)})
    text = tmp_path / "text"
    text.mkdir()
    documents = load_corpus([str(tiny_models.text(text, n_files=2, n_words=200))])
    stores = [extract(host, documents, n_tokens=100, context=16, progress=False) for host in (plain, centred)]
    assert stores[1].manifest["center_writing_weights"] is True
    with pytest.warns(UserWarning, match="says center_writing_weights=True, but these activations"):
        evaluate(sae(**place, **CENTRED), None, stores[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*center_writing_weights.*")
        evaluate(sae(**place, **CENTRED), None, stores[1])
        with splice(centred.model, sae(**place, **CENTRED)):
            pass
    with pytest.warns(UserWarning, match="embedding is not centred"), splice(plain.model, sae(**place, **CENTRED)):
        pass


def test_other_models_are_not_centred_and_say_so(tmp_path):
    tiny_models.saved(tiny_models.llama(), tmp_path)
    options = HostOptions(model=str(tmp_path), dtype="float32")
    with pytest.warns(UserWarning, match=r"is for GPT-2 and .* is llama"):
        open_host(options, {"sae": sae(hook_name="blocks.2.hook_resid_pre", **CENTRED)})


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"seqpos_slice": [1, "x"]}, "seqpos_slice"),
        ({"seqpos_slice": [0, 9, 0]}, "seqpos_slice"),
        ({"exclude_special_tokens": ["<s>"]}, "exclude_special_tokens"),
        ({"model_from_pretrained_kwargs": {"fold_ln": True}, "hook_name": "blocks.2.mlp.hook_in"}, "fold_ln"),
        ({"model_from_pretrained_kwargs": {"dtype": "float16"}}, "float16"),
    ],
)
def test_settings_that_cannot_be_followed_give_a_warning(folder, said, named):
    said = {"hook_name": "blocks.2.hook_resid_pre", **said}
    with pytest.warns(UserWarning, match=named):
        open_host(HostOptions(model=str(folder)), {"sae": sae(**said)})
    harmless = {"prepend_bos": True, "seqpos_slice": [None], "exclude_special_tokens": False, "context_size": 64}
    assert making_of(harmless).other == ()
    assert making_of(harmless).reading == {}
    assert making_of({"model_from_pretrained_kwargs": 3, "context_size": "x"}).other == ()


def texts(folder, n_files=12, n_words=100):
    folder.mkdir()
    return str(tiny_models.text(folder, n_files=n_files, n_words=n_words))


READING = {"prepend_bos": False, "seqpos_slice": [2, 12, 3], "exclude_special_tokens": [1, 3, 5, 7, 9]}


@pytest.mark.parametrize("keys", [[one] for one in READING] + [list(READING)], ids="-".join)
def test_positions_are_those_the_sae_says(folder, tmp_path, keys):
    """Against the model's own activations at those positions, computed here."""
    reads = {key: READING[key] for key in keys}
    saved = sae(hook_name="blocks.2.hook_resid_pre", units=1.0, context_size=16, **reads)
    saved.save_pretrained(tmp_path / "sae")
    one = load_sae(tmp_path / "sae")
    options = TextOptions(
        model=str(folder), text=(texts(tmp_path / "text"),), tokens=60, whole_text=True, dtype="float32"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host = open_host(options, {"sae": one})
        found = open_held_out(options, {"sae": one}, host)
    tokens = found.store.sequences.tokens
    assert tokens.shape[1] == 16
    assert bool((tokens[:, 0] == 0).all()) == ("prepend_bos" not in keys)
    assert bool((tokens == 0).any())  # between documents
    keep = tokens != 0
    if "seqpos_slice" in keys:
        keep &= torch.isin(torch.arange(16), torch.tensor([2, 5, 8, 11]))
    if "exclude_special_tokens" in keys:
        keep &= ~torch.isin(tokens, torch.tensor([1, 3, 5, 7, 9]))
    resid = host.residual(tokens)
    keep &= resid.norm(dim=-1) <= found.store.manifest["norm_limit"]
    ours, theirs = resid[keep][:60].norm(dim=1), (found.store.tensor() / found.store.scale).norm(dim=1)
    assert torch.allclose(ours.sort().values, theirs.sort().values, rtol=1e-2)
    # And what is spliced leaves the same positions as they are.
    seen = {}

    class Host:
        bos_token_id = 0

        def splice(self, tokens, hook_name, replacements, *, kl):
            seen["zero"] = replacements["zero"](resid)
            return {
                name: SimpleNamespace(nll=torch.ones(len(tokens), 15), kl=torch.ones(len(tokens), 15))
                for name in replacements
            }

    splice_sequences(Host(), {}, tokens, found.splice, found.mean, batch=len(tokens))
    assert torch.equal((seen["zero"] != resid).any(-1), keep)


def test_saes_of_different_positions_are_scored_apart_and_stores_are_compared(folder, tmp_path):
    place = {"hook_name": "blocks.2.hook_resid_pre"}
    options = TextOptions(model=str(folder), text=(texts(tmp_path / "text"),), tokens=60, whole_text=True)
    both = {"a": sae(**place), "b": sae(**place, prepend_bos=False)}
    host = open_host(options, both)
    with pytest.raises(ConfigError, match=r"different positions \(a: all positions, BOS first; b: prepend_bos=False"):
        open_held_out(options, both, host)
    documents = load_corpus(list(options.text))
    plain, own = (extract(host, documents, n_tokens=100, context=16, progress=False, **one) for one in ({}, READING))
    assert plain.manifest["key"] != own.manifest["key"]
    for key, value in READING.items():
        with pytest.warns(UserWarning, match=rf"trained with {key}=.*extract\(.*making_of"):
            evaluate(sae(**place, **{key: value}), None, plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        evaluate(sae(**place, units=1.0, **READING), None, own)
        evaluate(sae(**place, units=1.0, prepend_bos=True, seqpos_slice=[None]), None, plain)
        evaluate(sae(**place, units=1.0, seqpos_slice=[0, 16]), None, plain)
    rsae = upgrade(sae(**place, units=1.0), own)
    train(rsae, own, steps=1, batch_size=16, progress=False)
    assert {key: rsae.metadata[key] for key in READING} == READING


@pytest.mark.parametrize(
    ("reads", "named"),
    [
        ({"seqpos_slice": (20, None)}, "seqpos_slice"),
        ({"seqpos_slice": (0, 9, 0)}, "seqpos_slice"),
        ({"seqpos_slice": "abc"}, "seqpos_slice"),
        ({"seqpos_slice": 3}, "seqpos_slice"),
        ({"exclude_special_tokens": "</s>"}, "exclude_special_tokens"),
        ({"exclude_special_tokens": [-1]}, "exclude_special_tokens"),
    ],
)
def test_impossible_seqpos_slices_are_refused(folder, tmp_path, reads, named):
    host = load_host(str(folder), dtype="float32")
    with pytest.raises(ConfigError, match=named):
        extract(host, load_corpus([texts(tmp_path / "text", 2)]), n_tokens=50, context=16, progress=False, **reads)


def test_special_tokens_are_the_tokenizers(folder, tmp_path):
    host = load_host(str(folder), dtype="float32")
    documents = load_corpus([texts(tmp_path / "text", 2)])
    store = extract(host, documents, n_tokens=50, context=16, exclude_special_tokens=True, progress=False)
    assert store.manifest["exclude_tokens"] == [0]


def test_dtype_and_context_are_those_the_sae_says(folder, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    tiny_models.text(text, n_files=12, n_words=100)
    said = {"model_from_pretrained_kwargs": {"dtype": "torch.float32"}, "context_size": 32}
    one = sae(hook_name="blocks.2.hook_resid_pre", units=1.0, **said)
    options = TextOptions(model=str(folder), text=(str(text),), tokens=60, whole_text=True)
    host = open_host(options, {"sae": one})
    assert host.dtype == torch.float32
    assert open_held_out(options, {"sae": one}, host).store.sequences.tokens.shape[1] == 32


@pytest.mark.parametrize("scale", ["y", [1.0], {"a": 1}])
def test_a_scale_that_is_no_number_is_named(folder, tmp_path, scale):
    saes = {"sae": sae(hook_name="blocks.2.hook_resid_pre", activation_scale=scale)}
    options = TextOptions(model=str(folder), text=(texts(tmp_path / "text"),), tokens=60, whole_text=True)
    with pytest.raises(FormatError, match="the activation_scale in the SAE's"):
        open_held_out(options, saes, open_host(options, saes))


def test_a_guessed_hook_gives_a_warning(folder):
    with pytest.warns(UserWarning, match=r"no SAE says at which hook .* blocks\.2\.hook_resid_pre"):
        open_host(HostOptions(model=str(folder), dtype="float32"), {"sae": sae()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_host(HostOptions(model=str(folder), dtype="float32", hook="blocks.1.hook_resid_pre"), {"sae": sae()})


# -- BOS, known by its token, which is 0 here


def test_bos_is_left_alone_wherever_it_stands():
    resid = torch.ones(2, 6, 4)
    tokens = torch.tensor([[0, 5, 6, 0, 7, 8], [5, 6, 7, 8, 9, 1]])
    seen = {}

    class Host:
        bos_token_id = 0

        def splice(self, tokens, hook_name, replacements, *, kl):
            for name, replace in replacements.items():
                seen[name] = resid if replace is None else replace(resid)
            return {name: SimpleNamespace(nll=torch.ones(2, 5), kl=torch.ones(2, 5)) for name in replacements}

    splice_sequences(Host(), {"x": sae(4, 8)}, tokens, Splice("h"), torch.full((4,), 3.0))
    left = (tokens == 0)[..., None].expand_as(resid)
    for name, value in (("zero", 0.0), ("mean", 3.0)):
        assert torch.equal(seen[name], torch.where(left, 1.0, value))
    assert bool((seen["sae:x"][left] == 1).all())


def test_the_mean_of_a_store_that_keeps_bos_is_that_of_text(folder, tmp_path):
    host = load_host(str(folder), dtype="float32")
    text = tmp_path / "text"
    text.mkdir()
    documents = load_corpus([str(tiny_models.text(text, n_files=6, n_words=40))])
    kept = extract(host, documents, n_tokens=150, context=16, keep_bos=True, drop_outliers=None, progress=False)
    bos = kept.tokens == 0
    assert 0 < int(bos.sum()) < len(kept)
    assert int((kept.positions[bos] > 0).sum()) > 0  # between documents, too
    assert torch.allclose(kept.mean, kept.tensor()[~bos].mean(0), atol=2e-2)
    assert not torch.allclose(kept.mean, kept.tensor().mean(0), atol=2e-2)


# -- one definition of l0; SAEs of which nothing is active


def test_codes_on_decoder_rows_of_zeros_are_the_first_to_go():
    x = sparse_activations()
    a, b = sae(16, 64, 1), sae(16, 64, 5)
    with torch.no_grad():
        b.b_enc.sub_(1.0)
        a.W_dec[:24], a.b_enc[:24] = 0, 50.0
    found = compare({"b": b, "a": a}, x)
    assert found["matched_l0"]["a"]["l0"] <= found["b"]["l0"] + 1e-3
    assert found["matched_l0"]["a"]["l0"] == pytest.approx(found["b"]["l0"], rel=1e-2)
    # An l0 that all but those codes have: they go, and tau is 0.
    at = at_l0(a, x, found["a"]["l0"] - 24 + 1e-3)
    assert (at.tau, at.cut) == (0.0, True)
    assert reconstruction(at, x).l0 == pytest.approx(found["a"]["l0"] - 24)


def test_an_sae_of_which_nothing_is_active_gets_scores_and_stops_no_other():
    x = sparse_activations()
    dead, live = sae(16, 64), sae(16, 64, 2)
    with torch.no_grad():
        dead.b_enc.fill_(-500)
    for saes in ({"dead": dead}, {"dead": dead, "live": live}, {"live": live, "dead": dead}):
        found = compare(saes, x)
        assert (found["dead"]["l0"], found["dead"]["alive_fraction"]) == (0, 0)
        if "live" in saes:
            assert found["live"] == compare({"live": live}, x)["live"]
    with pytest.warns(UserWarning, match="no feature of the teacher was active"):
        made = upgrade(dead, x)
    assert "nothing was compared" in made.metadata["stage1"]["summary"]
    assert "0.00 %" not in made.metadata["stage1"]["summary"]


# -- stage 1 in 16 bits, and at the ends of the range


@pytest.mark.parametrize("thresholds", ["feature", "token"])
@pytest.mark.parametrize("scale", [1, 400])
def test_a_topk_teacher_in_float16_is_upgraded_as_in_float32(thresholds, scale):
    x = sparse_activations() * scale
    found = {}
    for dtype in (torch.float32, torch.float16):
        teacher = TopKSAE(16, 64, k=6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            teacher.b_dec.copy_(x.mean(0))
        teacher = teacher.to(dtype)
        made = upgrade(teacher, x.to(dtype), thresholds=thresholds)
        assert made.W_enc.dtype == dtype
        assert torch.equal(made.W_enc, teacher.W_enc)
        found[dtype] = made.metadata["stage1"], reconstruction(made, x.to(dtype))
    wide, narrow = found.values()
    assert narrow[0]["relative_error"] == pytest.approx(wide[0]["relative_error"], rel=0.05)
    assert narrow[1].mse == pytest.approx(wide[1].mse, rel=0.02)
    assert narrow[1].l0 == pytest.approx(wide[1].l0, rel=0.01)
    if thresholds == "token":
        assert narrow[1].l0 <= 6  # of equal pre-activations no more are kept than k


def test_a_direct_gate_that_overflows_is_refused():
    for teacher in (JumpReluSAE(4, 8, threshold=3e38), JumpReluSAE(4, 8, threshold=1e30)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = upgrade(teacher, 1e30 * torch.randn(64, 4), form="direct")
            except NumericsError:
                continue
        assert "nan" not in made.metadata["stage1"]["summary"]


def test_activations_that_hang_on_a_model_leave_it_alone():
    model = torch.nn.Linear(16, 16)
    x = model(sparse_activations())
    made = upgrade(sae(16, 64), x)
    compare({"made": made}, x)
    assert model.weight.grad is None
    assert not made.W_enc.grad_fn


# -- memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("what", ["upgrade", "evaluate"])
def test_memory_is_that_of_the_rows_that_are_looked_at(tmp_path, what):
    """A store of 64 MiB in bfloat16, 128 in float32; what stage 1 and scores take besides the mapped files."""
    x = torch.randn(1 << 12, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    store_tensor(x.repeat(64, 1), tmp_path / "s", rows_per_shard=1 << 14)
    code = f"""
        import threading, time, torch, warnings
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        from rsae_triton import evaluate, upgrade
        from rsae_triton.activations import ActivationStore
        from rsae_triton.teachers import ReluSAE
        def anonymous():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
        teacher = ReluSAE(128, 32)
        teacher.b_enc.data.fill_(-2.0)
        go = lambda store: evaluate(teacher, None, store) if {what == "evaluate"} else upgrade(teacher, store)
        go(ActivationStore({str(tmp_path / "s")!r}, shards=(0, 16)))
        store = ActivationStore({str(tmp_path / "s")!r})
        before, peak, ended = anonymous(), [0], []
        def watch():
            while not ended:
                peak[0] = max(peak[0], anonymous() - before)
                time.sleep(0.002)
        watcher = threading.Thread(target=watch)
        watcher.start()
        go(store)
        ended.append(1)
        watcher.join()
        print(peak[0] // 1024)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64, run.stdout
