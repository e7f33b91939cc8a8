"""Train in two processes that share the parameters (PyTorch's FSDP), and compare with one process.

Run with the path of a file that does not exist yet, where the processes find each other. Without two GPUs the kernels
run in the interpreter, and the processes talk over gloo.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from maxattn.nn import MaxAttention
from maxattn.ops.registry import registered
from maxattn_triton import Triton

WORLD = 2
DEVICE = "cuda" if torch.cuda.device_count() >= WORLD else "cpu"


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    block = MaxAttention(32, window=3, head_dim=16, backend="triton")
    grid = MaxAttention(32, axis="grid", window=3, head_dim=16, backend="triton")
    return nn.Sequential(block, grid).to(DEVICE)


def images(rank: int) -> Tensor:
    return torch.randn(2, 7, 6, 32, generator=torch.Generator().manual_seed(rank)).to(DEVICE)


def train(rank: int, rendezvous: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rendezvous, rank=rank, world_size=WORLD)
    mesh = init_device_mesh(DEVICE, (WORLD,))
    with registered(Triton()):
        whole, sharded = layers(), layers()
        for layer in sharded:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded(images(rank)).square().mean().backward()
        whole(torch.cat([images(other) for other in range(WORLD)])).square().mean().backward()
    for shard, parameter in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(shard.grad.full_tensor(), parameter.grad)
    dist.destroy_process_group()


if __name__ == "__main__":
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    mp.spawn(train, args=(f"file://{sys.argv[1]}",), nprocs=WORLD)
