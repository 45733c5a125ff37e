"""What `import rsae_triton as rt` shows, and that a misspelt setting is told."""

import typing
from os import PathLike
from pathlib import Path

import pytest
import torch
from workers import small_sae

import rsae_triton as rt
from rsae_triton.training.options import TrainOptions
from rsae_triton.training.settings import TrainSettings


def test_only_public_names_are_shown():
    shown = [name for name in dir(rt) if not name.startswith("__")]
    assert shown == sorted(rt.__all__)
    assert all(getattr(rt, name).__doc__ for name in shown)
    assert all(callable(one) for one in (rt.train, rt.upgrade, rt.evaluate))


def test_every_setting_is_a_typed_argument_of_train():
    options, settings = (typing.get_type_hints(one) for one in (TrainOptions, TrainSettings))
    options["out"] = Path | None if options["out"] == str | PathLike[str] | None else options["out"]
    assert options == settings


@pytest.mark.parametrize(("wrong", "meant"), [("step", "steps"), ("learning_rate", ""), ("batchsize", "batch_size")])
def test_a_misspelt_setting_is_told(wrong, meant):
    with pytest.raises(rt.RsaeError, match=f"no '{wrong}'; (did you mean .*{meant}|there are steps, )"):
        rt.train(small_sae("relu"), torch.zeros(512, 16), **{"steps": 1, wrong: 1})


def test_a_run_needs_steps():
    with pytest.raises(rt.RsaeError, match="train needs steps"):
        rt.train(small_sae("relu"), torch.zeros(512, 16))
