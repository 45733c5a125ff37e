"""Tensors of 2^31 elements and more, which no test can allocate: the interpreter runs the last program of a launch
whose memory is not there, and the test looks at the addresses that it asks for."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from rsae_triton.kernels import INTERPRETED
from rsae_triton.kernels.encode_backward import encode_backward_kernel
from rsae_triton.kernels.encode_forward import encode_forward_kernel
from rsae_triton.kernels.rational_backward import rational_backward_kernel
from rsae_triton.kernels.rational_forward import rational_forward_kernel

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")

F, N, D = 2**20 + 5, 2**14 + 7, 3  # features, tokens, d_in: codes of 1.7e10 elements, and sums of more than 2^31
WIDE = 2**13  # between the rows of a matrix
GATE = {"P": 1, "Q": 1, "GATED": False, "CLAMP": True, "IDENTITY": False, "HARD": True, "SHARED": True}
BACKWARD = {**GATE, "RATIONAL_BACKWARD": False, "HAS_DCOUNTS": False, "HAS_DL1": False, "COEFFICIENTS": True}
TILE = {"BLOCK_F": 16, "BLOCK_N": 16, "BLOCK_D": 16, "SUB": 1, "GROUP": 4, "PRECISION": "ieee"}
POINTWISE = {"BLOCK_F": 4, "LANES": 32, "VECTOR": 1, "STAGES": 1}
N_PARTIAL = (N + 15) // 16


@pytest.fixture
def asked_for(monkeypatch):
    """Runs the program of the given ids on tensors of one element, and returns the addresses it asked for."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    addresses = []

    def note(pointers, mask):
        addresses.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel())

    def load(self, pointers, mask, *_):
        note(pointers, mask)
        element = pointers.get_element_ty()
        return handle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(element)), element)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", lambda self, pointers, value, mask, *_: note(pointers, mask))

    def run(kernel, ids, tensors, *sizes, **constants):
        addresses.clear()
        monkeypatch.setattr(
            builder, "create_get_program_id",
            lambda self, axis: handle(np.array([ids[axis]], dtype=np.int32), tl.int32),
        )  # fmt: skip
        kernel[(1,)](*tensors, *sizes, **constants)
        return {int(address) for address in np.concatenate(addresses)}

    return run


def tensors(*dtypes):
    return [torch.zeros(1, dtype=dtype) for dtype in dtypes]


def addresses(tensor, offsets):
    return {tensor.data_ptr() + offset * tensor.element_size() for offset in offsets}


def corner(rows, row_length, height, width):
    """Offsets of the last `height` rows' last `width` elements."""
    return [f * row_length + n for f in range(rows - height, rows) for n in range(row_length - width, row_length)]


BF16, FP32 = torch.bfloat16, torch.float32


def test_encode_forward(asked_for):
    x, w, z, h, partial, _, rows = every = tensors(BF16, BF16, BF16, BF16, FP32, FP32, FP32)
    feature_blocks = -(-F // 16)
    last = feature_blocks * N_PARTIAL - 1
    asked = asked_for(encode_forward_kernel, (last,), every, F, N, D, WIDE, 1, 1, WIDE, SAVE_H=True, **GATE, **TILE)
    for tensor in (z, h):
        assert addresses(tensor, corner(F, N, 5, 7)) <= asked
    assert addresses(w, [f * WIDE + d for f in range(F - 5, F) for d in range(D)]) <= asked
    assert addresses(x, [n * WIDE + d for n in range(N - 7, N) for d in range(D)]) <= asked
    assert addresses(partial, [2 * N_PARTIAL * F - 1]) <= asked
    assert addresses(rows, [3 * F - 1]) <= asked
    assert min(asked) >= min(one.data_ptr() for one in every)


def test_encode_backward(asked_for):
    kinds = (BF16, BF16, BF16, BF16, BF16, FP32, FP32, FP32, FP32, FP32)
    g, w, h, dh, z, _, _, partial, _, _ = every = tensors(*kinds)
    last = -(-F // 16) * N_PARTIAL - 1
    asked = asked_for(
        encode_backward_kernel, (last,), every, F, N, D, WIDE, 1, WIDE, 1, SAVE_Z=True, LANES=1, **BACKWARD, **TILE
    )
    for tensor in (h, dh, z):
        assert addresses(tensor, corner(F, N, 5, 7)) <= asked
    assert addresses(w, [f * WIDE + d for f in range(F - 5, F) for d in range(D)]) <= asked
    assert addresses(g, [n * WIDE + d for n in range(N - 7, N) for d in range(D)]) <= asked
    assert addresses(partial, [N_PARTIAL * 7 * F - 1]) <= asked
    assert min(asked) >= min(one.data_ptr() for one in every)


def test_rational_forward(asked_for):
    h, z, partial, _, _ = every = tensors(BF16, BF16, FP32, FP32, FP32)
    splits, split = 3000, N // 32 // 2 * 32
    ids = (-(-F // 4) - 1, 2)  # the third of three runs of tokens, for the last features
    asked = asked_for(rational_forward_kernel, ids, every, F, N, split, **GATE, **POINTWISE)
    width = N - 2 * split
    assert 0 < width < split
    for tensor in (h, z):
        assert addresses(tensor, corner(F, N, 1, width)) <= asked
    asked = asked_for(rational_forward_kernel, (ids[0], splits), every, F, N, split, **GATE, **POINTWISE)
    assert addresses(partial, [2 * (splits + 1) * F - 1]) <= asked


def test_rational_backward(asked_for):
    h, dz, dh, _, _, partial, _, _ = every = tensors(BF16, BF16, BF16, FP32, FP32, FP32, FP32, FP32)
    splits, split = 3000, N // 32 // 2 * 32
    ids = (-(-F // 4) - 1, 2)
    asked = asked_for(rational_backward_kernel, ids, every, F, N, split, **BACKWARD, **POINTWISE)
    for tensor in (h, dz, dh):
        assert addresses(tensor, corner(F, N, 1, N - 2 * split)) <= asked
    asked = asked_for(rational_backward_kernel, (ids[0], splits), every, F, N, split, **BACKWARD, **POINTWISE)
    assert addresses(partial, [7 * (splits + 1) * F - 1]) <= asked
