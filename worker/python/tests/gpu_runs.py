"""What workers do on a GPU that they share, and the same on the CPU; see test_gpu.py."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import arc_topk
import jobs


def trained(rank: int, device: str, form: str, settings: dict[str, Any], dtype: str, scaled: bool) -> dict[str, Any]:
    """Parameters after some steps, and where they were compressed."""
    with jobs.process_group() if form == "ddp" else contextlib.nullcontext():
        net = jobs.model().to(device, getattr(torch, dtype))
        scaler = torch.amp.grad_scaler.GradScaler(device, init_scale=1024.0) if scaled else None
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        wrapped: nn.Module = net
        if form == "ddp":
            wrapped = DistributedDataParallel(net)
            exchange = arc_topk.register(wrapped, scaler=scaler, **settings)
        else:
            optimizer = arc_topk.DistributedOptimizer(optimizer, net.named_parameters(), scaler=scaler, **settings)
            exchange = optimizer.exchange
        for step in range(6):
            optimizer.zero_grad()
            inputs, wanted = (part.to(device, getattr(torch, dtype)) for part in jobs.batch(rank, step))
            loss = nn.functional.mse_loss(wrapped(inputs), wanted)
            jobs.step(optimizer, loss, scaler)
        return {
            "gpu": None if exchange.gpu is None else exchange.gpu.index,
            "parameters": [parameter.detach().float().cpu() for parameter in net.parameters()],
            "state": exchange.state_dict(),
        }
