"""One rank of a training step and a capture under FSDP2; imported by the process that the test starts, so it imports little."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from families import FAMILIES
from hand import ids, vector
from torch import Tensor

from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row

SITES = ("layers.1.output", "layers.1.attn.z")


class Last:
    """Accumulator that keeps the latest batch."""

    def update(self, h: Tensor, weight: Tensor, rows: Tensor) -> None:
        self.h = h.clone()


def plan() -> Plan:
    return Plan([Intervention(Add(vector(seed=seed)), site) for seed, site in enumerate(SITES)])


def train(rank: int, store: str) -> dict[str, Any]:
    """Half a batch on each of two ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        model = FAMILIES["llama"]()
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        digest = Anatomy.find(model).fingerprint()["embedding_digest"]
        steered = plan().attach(model)
        x = ids(4)[2 * rank : 2 * rank + 2]
        model(input_ids=x, labels=x).loss.backward()
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad.full_tensor()
        steered.detach()
        last = Last()
        finished: list[str] = []
        model.register_forward_hook(lambda *_: finished.append("model"))
        capture(model, [Row(tuple(ids()[0].tolist()), 2)], {Site.parse("layers.0.output"): last}, span="all")
        dist.barrier()  # a rank that leaves while the other one still sends is ended by gloo
        return {"gradient": gradient, "fired": steered.fired(), "digest": digest, "h": last.h, "finished": finished}
    finally:
        dist.destroy_process_group()
