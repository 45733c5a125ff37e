"""Without SAELens the package works, and what needs it says how to get it."""

import importlib.util

import pytest

from rsae_triton.common.errors import SourceError


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="sae-lens is installed")
def test_importing_says_what_to_install():
    with pytest.raises(SourceError, match=r"pip install 'sae-lens==6\.54\.\*'"):
        import rsae_triton.integrations.saelens  # noqa: F401
