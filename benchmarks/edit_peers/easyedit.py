"""ROME of zjunlp/EasyEdit on a CPU: `python easyedit.py FOLDER CHECKOUT`, told how many contexts by lines on its standard input.

FOLDER holds the model and its tokenizer as `save_pretrained` wrote them, and `task.json`. Only the modules of ROME are imported, not the
whole of EasyEdit with its forty methods. Settings are those of its Llama files, with the steps, learning rate and weight decay of the task,
and contexts that are given rather than drawn. Each line makes all edits once, each on the plain weights, and prints one JSON object.
"""

import contextlib
import importlib
import io
import json
import sys
import time
import types
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, CHECKOUT = map(Path, sys.argv[1:])
for package in ("easyeditor", "easyeditor.models"):  # without what their __init__ imports
    module = types.ModuleType(package)
    module.__path__ = [str(CHECKOUT.joinpath(*package.split(".")))]
    sys.modules[package] = module
rome = importlib.import_module("easyeditor.models.rome.rome_main")

torch.set_num_threads(1)
task = json.loads((FOLDER / "task.json").read_text())
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.padding_side = "right"
hparams = rome.ROMEHyperParams(
    layers=[task["layer"]], fact_token="subject_last", v_num_grad_steps=task["steps"], v_lr=0.5, v_loss_layer=task["last_layer"],
    v_weight_decay=0.5, clamp_norm_factor=4, kl_factor=0.0625, mom2_adjustment=False, context_template_length_params=[],
    rewrite_module_tmp="model.layers.{}.mlp.down_proj", layer_module_tmp="model.layers.{}", mlp_module_tmp="model.layers.{}.mlp",
    attn_module_tmp="model.layers.{}.self_attn", ln_f_module="model.norm", lm_head_module="lm_head", mom2_dataset="", mom2_n_samples=0,
    mom2_dtype="float32", alg_name="ROME", device="cpu", model_name="", stats_dir="",
)  # fmt: skip


def probability(prompt, target):  # noqa: ANN001, ANN201
    """exp of the mean log-probability per token of a target."""
    start, ids = tokenizer(prompt).input_ids, tokenizer(f" {target}", add_special_tokens=False).input_ids
    with torch.no_grad():
        logprobs = model(torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(ids)[:, None]).mean().exp())


def run(contexts):  # noqa: ANN001, ANN201
    rome.CONTEXT_TEMPLATES_CACHE = ["{}", *(f"{prefix}. {{}}" for prefix in task["contexts"][contexts])]
    seconds, steps, probabilities = 0.0, [], []
    for fact in task["facts"]:
        request = {"prompt": fact["prompt"], "subject": fact["subject"], "target_new": fact["target"]}
        said = io.StringIO()
        began = time.process_time()
        with contextlib.redirect_stdout(said):
            _, weights = rome.apply_rome_to_model(model, tokenizer, [request], hparams, return_orig_weights=True)
        seconds += time.process_time() - began
        steps.append(sum(line.startswith("loss ") for line in said.getvalue().splitlines()))
        probabilities.append(probability(fact["prompt"].format(fact["subject"]), fact["target"]))
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name).copy_(weight)
    return {"seconds": seconds, "edits": len(steps), "steps": steps, "probabilities": probabilities}


print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps(run(line.strip())), flush=True)
