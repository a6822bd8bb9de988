"""What tensors look like to the native half."""

from __future__ import annotations

import torch

from . import _native

#: Types that can be averaged, as the native half calls them.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def dtype_name(tensor: torch.Tensor) -> str:
    """The native half's name of an element type."""
    try:
        return DTYPES[tensor.dtype]
    except KeyError:
        raise _native.ConfigError(f"a tensor of {tensor.dtype} cannot be averaged: use float32, bfloat16 or float16") from None


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie one after the other, rows (of the first dimension) first."""
    if tensor.is_contiguous():
        return True
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as they lie in memory, where they lie."""
    return tensor.as_strided((tensor.numel(),), (1,))
