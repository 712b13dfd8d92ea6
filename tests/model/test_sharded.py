"""FSDP2 over two processes, this one being rank 0."""

import torch
import torch.multiprocessing as mp
from hand import ids, recorded
from sharded import plan, train


def test_fsdp2_over_two_processes(tmp_path, tiny):
    """Sharded training with the plan gives the gradient of one process, and a capture runs through."""
    store = str(tmp_path / "store")
    second_rank = mp.get_context("spawn").Process(target=train, args=(1, store), daemon=True)
    second_rank.start()
    sharded = train(0, store)
    second_rank.join(60)
    assert second_rank.exitcode == 0

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
