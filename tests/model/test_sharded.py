"""FSDP2 over two processes, this one being rank 0."""

import pytest
import torch
import torch.distributed as dist
from hand import ids, recorded
from processes import ended, started
from sharded import plan, train
from torch import nn
from torch.distributed.fsdp import fully_shard

from steer.errors import AnatomyError
from steer.model.anatomy import Anatomy


def test_fsdp2_over_two_processes(tmp_path, tiny):
    """Sharded training with the plan gives the gradient of one process, and a capture runs through."""
    store = str(tmp_path / "store")
    second_rank = started(lambda: bool(train(1, store)["finished"] != ["model"]))
    sharded = train(0, store)
    assert ended([second_rank]) == [0]

    model = tiny("llama")
    with torch.no_grad(), recorded(model, ["layers.0.output"]) as seen:
        model(ids()[:1])
    with plan().attached(model):
        model(input_ids=ids(4), labels=ids(4)).loss.backward()
    assert torch.allclose(sharded["gradient"], model.model.layers[0].self_attn.q_proj.weight.grad, atol=1e-6)
    assert sharded["fired"] == {"add@layers.1.output": 14, "add@layers.1.attn.z": 14}
    assert sharded["digest"] is None  # a rank holds no whole rows
    assert sharded["finished"] == ["model"]  # no early stop: FSDP counts on the end of every forward
    assert torch.allclose(sharded["h"], seen["layers.0.output"], atol=1e-6)


def test_a_model_sharded_from_outside_is_not_run_by_itself(tiny, tmp_path):
    """FSDP would take it for the outermost module; what was found before the sharding stays known."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for known in (False, True):
            outer = nn.Sequential(tiny("llama"))
            if known:
                Anatomy.find(outer).point("layers.0.attn.output")
            fully_shard(outer[0].model, mesh=mesh)
            fully_shard(outer, mesh=mesh)
            if known:
                assert Anatomy.find(outer).point("layers.0.attn.output").path == "0.model.layers.0.self_attn"
            else:
                with pytest.raises(AnatomyError, match="before sharding"):
                    Anatomy.find(outer)
    finally:
        dist.destroy_process_group()
