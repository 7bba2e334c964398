"""The Triton kernels in Triton's interpreter, on few tokens: a row is still several tiles and stretches there.

On a GPU the same kernels run the tests marked `gpu`, here and in the other files of this folder.
"""

import importlib.util

import pytest
import torch
from scan_checks import assert_within_twice_the_error_of_the_reference, make_inputs, outputs_and_gradients

from mabert.ops import depthwise_conv, selective_scan, use_backend

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here: the tests marked gpu run its kernels"),
]

CU = torch.tensor([0, 3, 3, 22, 23, 37], dtype=torch.int32)  # an empty and a one-token sequence among them
SOME = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) > 0.4
LAYOUTS = {
    "empty": {"length": 0},
    "one step": {"length": 1},
    "several stretches": {"length": 37},
    "mask": {"length": 21, "mask": SOME},
    "all-pad row": {"length": 9, "mask": torch.tensor([[True] * 9, [False] * 9])},
    "packed": {"length": 37, "cu_seqlens": CU},
    "packed and masked": {
        "length": 37,
        "cu_seqlens": CU,
        "mask": torch.rand(1, 37, generator=torch.Generator().manual_seed(2)) > 0.3,
    },
    "packed, sequences beginning and ending with stretches": {
        "length": 48,
        "cu_seqlens": torch.tensor([0, 16, 32, 32, 48], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_in_every_layout(layout, reverse):
    options = dict(LAYOUTS[layout], reverse=reverse)
    length, boundaries = options.pop("length"), options.get("cu_seqlens")
    sequences = None if boundaries is None else len(boundaries) - 1
    batch = 1 if sequences else 2
    inputs = make_inputs(batch, length, 9, 2, sequences=sequences, dtype=torch.float32)
    actual = outputs_and_gradients(inputs, backend="triton", **options)
    assert_within_twice_the_error_of_the_reference(inputs, actual, **options)
