"""Edits of models whose weights are not all in memory: sharded over ranks (FSDP2), or offloaded by accelerate."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from edits.edit_helpers import IDS, model_of, random_edit, weights_of
from edits.editor_helpers import UNSAID, edit
from processes import run_on_ranks

from steer.edits import EditedWeights, ValueStore
from steer.errors import EditError


def refused_on_a_rank() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    try:
        made, model = random_edit(model_of("llama"), layers=(0,)), model_of("llama")
        for block in model.model.layers:
            fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        edited = EditedWeights.of(model)
        with pytest.raises(EditError, match=r"sharded over ranks[\s\S]*before the model is sharded"):
            edited.apply(made)
        with pytest.raises(EditError, match=r"sharded[\s\S]*before it is sharded"):
            edit(model, editor="lora", covariance=None)
        assert not edited.applied
        # what was edited before is sharded with its edit, and says so when it is to be taken out
        whole = model_of("llama")
        EditedWeights.of(whole).apply(made)
        expected = whole.model.layers[0].mlp.down_proj.weight.detach().clone()
        fully_shard(whole.model.layers[0], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        assert torch.equal(whole.model.layers[0].mlp.down_proj.weight.full_tensor(), expected)
        with pytest.raises(EditError, match=r"sharded over ranks[\s\S]*revert edits before"):
            EditedWeights.of(whole).revert(made)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_sharded_weights_are_refused_on_every_rank():
    run_on_ranks(refused_on_a_rank)


def offload(block, folder):
    cpu_offload(block, execution_device="cpu") if folder is None else disk_offload(block, folder, execution_device="cpu")


@pytest.mark.parametrize("on_disk", [False, True])
def test_where_other_blocks_are_offloaded_an_edit_is_right_or_refused(on_disk, tmp_path):
    model, made = model_of("llama"), edit(model_of("llama"), UNSAID)
    before = weights_of(model)
    with torch.no_grad(), made.applied(model):
        edited_logits = model(IDS).logits
    offload(model.model.layers[1], tmp_path if on_disk else None)
    store = ValueStore()
    again = edit(model, UNSAID, values=store)  # of block 0, below what is offloaded
    assert torch.allclose(again.deltas[0].change(), made.deltas[0].change(), atol=1e-6) and not len(store)
    with torch.no_grad(), made.applied(model):
        assert torch.allclose(model(IDS).logits, edited_logits, atol=1e-5)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(EditError, match=r"offloaded[\s\S]*without offloading"):
        edit(model, UNSAID, layers=[1])
    with pytest.raises(EditError, match=r"offloaded[\s\S]*device_map"):
        EditedWeights.of(model).apply(random_edit(model_of("llama"), layers=(1,)))
    other = model_of("llama")
    offload(other.model.layers[0], tmp_path if on_disk else None)
    with pytest.raises(EditError, match=r"needs them in memory[\s\S]*without offloading"):
        edit(other, UNSAID, layers=[1])  # the covariance is that of the blocks below, which nobody can compare
    assert not EditedWeights.of(other).applied
