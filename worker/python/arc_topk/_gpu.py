"""Gradients that stay on their GPU: the worker compresses them there, on a stream of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from . import _native
from ._tensors import dtype_name, flat, is_dense
from .config import Config

logger = logging.getLogger("arc_topk")


def chosen(tensors: Iterable[torch.Tensor], config: Config) -> torch.device | None:
    """The GPU that compresses; ``None``: the CPU does."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise _native.ConfigError(f"device is {config.device!r}: it must be auto, cpu or cuda")
    devices = {tensor.device for tensor in tensors}
    if config.device == "cpu" or (all(device.type != "cuda" for device in devices) and config.device == "auto"):
        return None
    try:
        return _usable(devices, config)
    except _native.ConfigError as error:
        if config.device == "cuda":
            raise
        logger.warning("gradients are copied to main memory and compressed there: %s", error)
        return None


def _usable(devices: set[torch.device], config: Config) -> torch.device:
    if config.compressor == "topk":
        raise _native.ConfigError("compressor topk is computed on the CPU alone: take arc (or randk), or device='cpu'")
    device = next(iter(devices))
    if len(devices) > 1 or device.type != "cuda":
        there = ", ".join(sorted(str(device) for device in devices))
        raise _native.ConfigError(f"the tensors are on {there}, not on one GPU: move them to one, or pass device='cpu'")
    name = _native.gpu_name(device.index)
    logger.info("gradients are compressed on GPU %d (%s)", device.index, name)
    return device


def lend(session: _native.Session, index: int, gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """Hands over a gradient; returns the tensor in whose memory the result will lie."""
    values = gradient if is_dense(gradient) else gradient.contiguous()
    if scale != 1.0:
        values.mul_(1.0 / scale)
    stream = torch.cuda.current_stream(values.device).cuda_stream
    session.lend_on_device(index, values, values.data_ptr(), values.numel(), dtype_name(values), stream)
    return values


def take(
    session: _native.Session,
    targets: list[tuple[int, int, int, str]],
    scale: float,
    device: torch.device,
    results: Iterable[tuple[int, torch.Tensor]],
    lent: Mapping[int, torch.Tensor],
) -> None:
    """Writes the results to ``targets`` in main memory, and sees to it that those of ``results`` that were lent hold theirs."""
    stream = torch.cuda.current_stream(device).cuda_stream
    # Not in place, because the job went on without this step's gradients.
    for index, values in session.results(targets, scale, list(lent), stream):
        flat(lent[index]).copy_(torch.frombuffer(bytearray(values), dtype=torch.float32))
    for index, tensor in results:
        held = lent.get(index)
        if held is None:
            continue
        if scale != 1.0:
            held.mul_(scale)
        if held.data_ptr() != tensor.data_ptr():
            tensor.copy_(held)
