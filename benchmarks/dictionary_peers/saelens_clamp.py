"""SAELens: a dictionary in the place of an activation, with its error term and some features set. Answers a line with CPU seconds."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder, value = Path(sys.argv[1]), float(sys.argv[2])
task = load_file(folder / "task.safetensors")
sae = SAE.load_from_disk(folder / "dictionary")
sae.requires_grad_(False)
sae.use_error_term = True
chosen = task["features"]


def put(acts: torch.Tensor, hook: object) -> torch.Tensor:
    acts = acts.clone()
    acts[..., chosen] = value
    return acts


sae.add_hook("hook_sae_acts_post", put)
h = task["h"].requires_grad_()


def backward() -> tuple[torch.Tensor, torch.Tensor]:
    out = sae(h)
    (gradient,) = torch.autograd.grad(out, h, task["g"])
    return out.detach(), gradient


out, gradient = backward()
save_file({"out": out, "gradient": gradient}, folder / "answer.safetensors")
weights = {tensor.untyped_storage().data_ptr() for tensor in (*sae.parameters(), *sae.buffers(), h)}
kept: dict[int, int] = {}


def keep(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in weights:
        kept[storage.data_ptr()] = storage.nbytes()
    return tensor


with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
    out = sae(h)
print(json.dumps({"version": version("sae-lens"), "torch": torch.__version__, "kept": sum(kept.values())}), flush=True)
del out
for line in sys.stdin:
    begin = time.process_time()
    if line.strip() == "backward":
        backward()
    else:
        with torch.no_grad():
            sae(h)
    print(time.process_time() - begin, flush=True)
