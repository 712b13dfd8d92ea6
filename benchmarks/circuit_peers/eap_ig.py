"""Edge scores of hannamw/EAP-IG on a CPU: `python eap_ig.py FOLDER CHECKOUT`, told what to do by lines on its standard input.

FOLDER holds a Llama model and its tokenizer as `save_pretrained` wrote them, and `pairs.json`. CHECKOUT is a clone of the repository in
which 'cuda' was replaced by model.cfg.device, without which it does not run on a CPU. A line `eap` or `eap_ig` makes it attribute once and
print one JSON object with the CPU seconds, the peak of memory above what the loaded model takes, and the seconds of one forward pass; the
scores lie in FOLDER/<method>.pt afterwards.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch

FOLDER, CHECKOUT = map(Path, sys.argv[1:])
sys.path.insert(0, str(CHECKOUT / "src"))

from eap.attribute import attribute  # noqa: E402
from eap.graph import Graph  # noqa: E402
from memory import peak_bytes, reset_peak  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402

torch.set_num_threads(1)
pairs = json.loads((FOLDER / "pairs.json").read_text())
hf = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
config = hf.config
cfg = HookedTransformerConfig(
    d_model=config.hidden_size, d_head=config.hidden_size // config.num_attention_heads, n_heads=config.num_attention_heads,
    n_key_value_heads=config.num_key_value_heads, d_mlp=config.intermediate_size, n_layers=config.num_hidden_layers,
    n_ctx=256, eps=config.rms_norm_eps, d_vocab=config.vocab_size, act_fn="silu", normalization_type="RMS",
    positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=config.hidden_size // config.num_attention_heads,
    rotary_base=int(json.loads((FOLDER / "config.json").read_text())["rope_parameters"]["rope_theta"]),
    final_rms=True, gated_mlp=True, original_architecture="LlamaForCausalLM", device="cpu", ungroup_grouped_query_attention=True,
)  # fmt: skip
OLD = FOLDER / "tokenizer_of_old"  # transformers 4 does not know the class that 5 writes down
OLD.mkdir(exist_ok=True)
shutil.copy(FOLDER / "tokenizer.json", OLD)
marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
(OLD / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **marks}))
tokenizer = AutoTokenizer.from_pretrained(OLD)
model = HookedTransformer(cfg, tokenizer=tokenizer)
model.load_state_dict(convert_llama_weights(hf, cfg), strict=False)
del hf
for setting in ("set_use_split_qkv_input", "set_use_attn_result", "set_use_hook_mlp_in", "set_ungroup_grouped_query_attention"):
    getattr(model, setting)(True)
right, wrong = torch.tensor(pairs["right"]), torch.tensor(pairs["wrong"])


def data():  # noqa: ANN201
    for start in range(0, len(right), pairs["batch"]):
        chosen = slice(start, start + pairs["batch"])
        yield pairs["clean"][chosen], pairs["corrupted"][chosen], torch.stack([right[chosen], wrong[chosen]], 1)


def metric(logits, clean_logits, lengths, labels):  # noqa: ANN001, ANN201
    last = logits[torch.arange(len(logits)), lengths - 1]
    chosen = last.gather(1, labels)
    return (chosen[:, 0] - chosen[:, 1]).sum()


def forward() -> float:
    began = time.process_time()
    with torch.no_grad():
        for clean, _, _ in data():
            model(model.to_tokens(clean, prepend_bos=True, padding_side="right"))
    return time.process_time() - began


def run(method: str) -> dict[str, float]:
    graph = Graph.from_model(model)
    settings = {"method": "EAP"} if method == "eap" else {"method": "EAP-IG-inputs", "ig_steps": pairs["steps"]}
    before = reset_peak()
    began = time.process_time()
    attribute(model, graph, list(data()), metric, quiet=True, **settings)
    seconds = time.process_time() - began
    used = peak_bytes() - before
    graph.to_pt(FOLDER / f"{method}.pt")
    return {"seconds": seconds, "bytes": used, "forward_seconds": forward()}


forward()
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps(run(line.strip())), flush=True)
