"""Files of dictionaries in the formats of other libraries, tiny, and what each library computes with them, written plainly in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, N, OUT, LAYERS = 6, 20, 6, 3
Encode = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Case:
    """One file.

    Attributes:
        path: to load it from. arguments: of `load_dictionary`.
        encode: [tokens, ...] activations -> [tokens, features]. decode: (features, activations) -> reconstruction.
        reads, writes: sites.
    """

    path: Path
    encode: Encode
    decode: Decode
    reads: list[str]
    writes: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    shape: tuple[int, ...] = (D,)


class Numbers:
    """Random tensors by name, fp32 for the file and fp64 for the formula."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, positive: bool = False) -> Tensor:
        tensor = torch.randn(shape, generator=self.generator) * scale
        return tensor.abs() if positive else tensor


def relu(x: Tensor) -> Tensor:
    return x.clamp_min(0)


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(pre > threshold, relu(pre), torch.zeros_like(pre))


def top(pre: Tensor, k: int, key: Tensor | None = None) -> Tensor:
    key = pre if key is None else key
    kept = key >= key.sort(-1, descending=True).values[..., k - 1 : k]
    return torch.where(kept, pre, torch.zeros_like(pre))


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def safetensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def write_json(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


# ---- SAELens


def saelens(folder: Path, architecture: str, *, flat: bool = False, **options: Any) -> Case:
    make, is_transcoder = Numbers(1), "transcoder" in architecture
    tensors = {"W_enc": make(D, N), "W_dec": make(N, OUT), "b_dec": make(OUT)}
    if architecture != "gated":
        tensors["b_enc"] = make(N)
    if "jumprelu" in architecture:
        tensors["threshold"] = make(N, positive=True)
    if architecture == "gated":
        tensors |= {"b_gate": make(N), "b_mag": make(N), "r_mag": make(N, scale=0.3)}
    if "skip" in architecture:
        tensors["W_skip"] = make(OUT, D)
    if "batchtopk" in architecture:
        tensors["topk_threshold"] = torch.tensor(0.7)
    config = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
    config["apply_b_dec_to_input"] = not is_transcoder
    metadata = {
        "hook_name": "blocks.2.mlp.hook_in" if is_transcoder else "blocks.2.hook_resid_post",
        "model_name": "tiny",
        "sae_lens_version": "6.54.12",
    }
    if is_transcoder:
        config["d_out"], metadata["hook_name_out"] = OUT, "blocks.2.hook_mlp_out"
    if "topk" in architecture:
        config["k"] = 4
    config |= {key: value for key, value in options.items() if key not in ("norm_factor", "center")}
    if options.get("center"):
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    write_json(folder, "cfg.json", {**config, **metadata} if flat else {**config, "metadata": metadata})
    safetensors(folder, "sae_weights.safetensors", tensors)
    t, norm, factor = wide(tensors), config["normalize_activations"], options.get("norm_factor", 1.0)

    def statistics(h: Tensor) -> tuple[Tensor, Tensor]:
        if norm == "layer_norm":
            return h.mean(-1, keepdim=True), (h - h.mean(-1, keepdim=True)).std(-1, keepdim=True)
        return (h.mean(-1, keepdim=True) if options.get("center") else 0 * h[..., :1]), 1 + 0 * h[..., :1]

    def encode(h: Tensor) -> Tensor:
        mean, deviation = statistics(h)
        x = (h - mean) / (deviation + 1e-5 if norm == "layer_norm" else 1) * factor
        if norm == "constant_norm_rescale":
            x = h * D**0.5 / h.norm(dim=-1, keepdim=True)
        x = x - t["b_dec"] * config["apply_b_dec_to_input"]
        if architecture == "gated":
            return torch.where(x @ t["W_enc"] + t["b_gate"] > 0, relu(x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]), 0.0)
        pre = x @ t["W_enc"] + t["b_enc"]
        if config.get("rescale_acts_by_decoder_norm"):
            pre = pre * t["W_dec"].norm(dim=-1)
        if "jumprelu" in architecture:
            return jump(pre, t["threshold"])
        if "batchtopk" in architecture:
            return jump(pre, t["topk_threshold"])
        return {"topk": lambda: relu(top(pre, 4)), "abstopk": lambda: top(pre, 4, pre.abs())}.get(architecture, lambda: relu(pre))()

    def decode(f: Tensor, h: Tensor) -> Tensor:
        mean, deviation = statistics(h)
        if config.get("rescale_acts_by_decoder_norm"):
            f = f / t["W_dec"].norm(dim=-1)
        out = f @ t["W_dec"] + t["b_dec"]
        if is_transcoder:
            return out + (h @ t["W_skip"].T if "skip" in architecture else 0)
        return out * (h.norm(dim=-1, keepdim=True) / D**0.5 if norm == "constant_norm_rescale" else deviation) / factor + mean

    reads = "layers.2.mlp.input" if is_transcoder else "layers.2.output"
    arguments = {"norm_factor": options["norm_factor"]} if "norm_factor" in options else {}
    return Case(folder, encode, decode, [reads], ["layers.2.mlp.output"] if is_transcoder else [reads], arguments)


# ---- Gemma Scope


def gemma_scope(folder: Path, kind: str = "res") -> Case:
    make = Numbers(2)
    t = {"W_enc": make(D, N), "W_dec": make(N, D), "b_enc": make(N), "b_dec": make(D), "threshold": make(N, positive=True)}
    place = "embedding" if kind == "embedding" else "layer_3"
    folder = folder / f"gemma-scope-2b-pt-{'res' if kind == 'embedding' else kind}" / place / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in t.items()})
    t, gain = wide(t), 1 + 0.3 * make(D)
    scale = D**0.5 if kind == "embedding" else 1.0
    arguments = {"gain": gain} if kind == "transcoders" else {}

    def encode(h: Tensor) -> Tensor:
        return jump((h / gain.double() if arguments else h / scale) @ t["W_enc"] + t["b_enc"], t["threshold"])

    reads = {"res": "layers.3.output", "mlp": "layers.3.mlp.output", "att": "layers.3.attn.z", "embedding": "embed"}.get(
        kind, "layers.3.mlp.input"
    )
    writes = "layers.3.mlp.output" if arguments else reads
    return Case(folder, encode, lambda f, h: (f @ t["W_dec"] + t["b_dec"]) * scale, [reads], [writes], arguments, first=1)


def gemma_scope_2(folder: Path, kind: str) -> Case:
    make = Numbers(3)
    t = {"w_enc": make(D, N), "w_dec": make(N, D), "b_enc": make(N), "b_dec": make(D), "threshold": make(N, positive=True)}
    inside, outside = (
        ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output") if "transcoder" in kind else ("output", "output")
    )
    if kind == "transcoder_affine":
        t["affine_skip_connection"] = make(D, D)
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-4b-pt", "type": kind.split("_")[0]}
    config |= {"hf_hook_point_in": f"model.layers.17.{inside}", "hf_hook_point_out": f"model.layers.17.{outside}"}
    write_json(folder, "config.json", config)
    safetensors(folder, "params.safetensors", t)
    t = wide(t)

    def decode(f: Tensor, h: Tensor) -> Tensor:
        return f @ t["w_dec"] + t["b_dec"] + (h @ t["affine_skip_connection"] if "affine" in kind else 0)

    sites = ("layers.17.mlp.input", "layers.17.mlp.output") if "transcoder" in kind else ("layers.17.output", "layers.17.output")
    return Case(folder, lambda h: jump(h @ t["w_enc"] + t["b_enc"], t["threshold"]), decode, [sites[0]], [sites[1]], first=1)


def gemma_scope_2_layers(folder: Path, kind: str) -> Case:
    make, skip = Numbers(4), kind == "clt_affine"
    layers = []
    for layer in range(LAYERS):
        t = {"w_enc": make(D, N), "w_dec": make(N, LAYERS, D), "b_enc": make(N), "b_dec": make(D), "threshold": make(N, positive=True)}
        layers.append({**t, "affine_skip_connection": make(D, D)} if skip else t)
        safetensors(folder, f"params_layer_{layer}.safetensors", layers[-1])
    which, model = ("{all}", "google/gemma-3-270m-it") if "clt" in kind else ("{5,9,12}", "google/gemma-3-270m-it")
    inside, outside = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output") if "clt" in kind else ("output", "output")
    hooks = {"hf_hook_point_in": f"model.layers.{which}.{inside}", "hf_hook_point_out": f"model.layers.{which}.{outside}"}
    write_json(folder, "config.json", {**hooks, "architecture": "jump_relu", "model_name": model, "type": kind.split("_")[0]})
    t = {name: torch.stack([layer[name] for layer in layers]).double() for name in layers[0]}

    def encode(h: Tensor) -> Tensor:
        return jump(torch.einsum("tld,ldn->tln", h, t["w_enc"]) + t["b_enc"], t["threshold"]).flatten(1)

    def decode(f: Tensor, h: Tensor) -> Tensor:
        out = torch.einsum("tln,lnod->tod", f.view(-1, LAYERS, N), t["w_dec"]) + t["b_dec"]
        return out + torch.einsum("tld,ldo->tlo", h, t["affine_skip_connection"]) if skip else out

    numbers = range(LAYERS) if "clt" in kind else (5, 9, 12)
    reads = [f"layers.{layer}.{'mlp.input' if 'clt' in kind else 'output'}" for layer in numbers]
    writes = [f"layers.{layer}.mlp.output" for layer in numbers] if "clt" in kind else reads
    return Case(folder, encode, decode, reads, writes, first=4 if "clt" in kind else 1, shape=(LAYERS, D))


# ---- Qwen-Scope, sparsify, dictionary_learning, OpenAI, Llama Scope


def qwen_scope(folder: Path) -> Case:
    make = Numbers(5)
    t = {"W_enc": make(1024, D), "W_dec": make(D, 1024), "b_enc": make(1024), "b_dec": make(D)}
    folder = folder / "SAE-Res-Qwen3-1.7B-Base-W1K-L0_7"
    folder.mkdir()
    torch.save(t, folder / "layer0.sae.pt")
    torch.save({name: tensor + 1 for name, tensor in t.items()}, folder / "layer1.sae.pt")
    t = {name: tensor.double() + 0.0 for name, tensor in wide({name: tensor + 1 for name, tensor in t.items()}).items()}
    reads = ["layers.1.output"]
    encode: Encode = lambda h: relu(top(h @ t["W_enc"].T + t["b_enc"], 7))  # noqa: E731
    return Case(folder, encode, lambda f, h: f @ t["W_dec"].T + t["b_dec"], reads, reads, {"layer": 1})


def sparsify(folder: Path, kind: str) -> Case:
    make = Numbers(6)
    t = {"encoder.weight": make(N, D), "encoder.bias": make(N), "W_dec": make(N, D), "b_dec": make(D)}
    config: dict[str, Any] = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": 4, "d_in": D}
    config |= {"multi_topk": False, "skip_connection": kind == "skip", "transcode": kind in ("transcoder", "skip")}
    if kind == "groupmax":
        config["activation"] = "groupmax"
    if kind == "skip":
        t["W_skip"] = make(D, D)
    if kind == "no_num_latents":
        del config["num_latents"]
        config["expansion_factor"] = 5
        t = {"encoder.weight": make(5 * D, D), "encoder.bias": make(5 * D), "W_dec": make(5 * D, D), "b_dec": make(D)}
    is_transcoder = config["transcode"]
    folder = folder / ("layers.5.mlp" if is_transcoder else "layers.5")
    write_json(folder, "cfg.json", config)
    safetensors(folder, "sae.safetensors", t)
    t = wide(t)

    def encode(h: Tensor) -> Tensor:
        pre = relu((h if is_transcoder else h - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
        if kind != "groupmax":
            return top(pre, 4)
        best = pre.view(-1, 4, N // 4).argmax(-1) + torch.arange(4) * (N // 4)
        return torch.zeros_like(pre).scatter(-1, best, pre.gather(-1, best))

    def decode(f: Tensor, h: Tensor) -> Tensor:
        return f @ t["W_dec"] + t["b_dec"] + (h @ t["W_skip"].T if kind == "skip" else 0)

    reads = ["layers.5.mlp.input"] if is_transcoder else ["layers.5.output"]
    return Case(folder, encode, decode, reads, ["module:layers.5.mlp:output"] if is_transcoder else reads)


def dictionary_learning(folder: Path, name: str) -> Case:
    make = Numbers(7)
    linear = name not in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    t = (
        {"encoder.weight": make(N, D), "decoder.weight": make(D, N)}
        if linear
        else {"W_enc": make(D, N), "W_dec": make(N, D), "b_enc": make(N)}
    )
    if linear and name != "GatedAutoEncoder":
        t["encoder.bias"] = make(N)
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(name, "b_dec")
    t[bias] = make(D)
    if name == "GatedAutoEncoder":
        t |= {"r_mag": make(N, scale=0.3), "gate_bias": make(N), "mag_bias": make(N)}
    if name == "JumpReluAutoEncoder":
        t["threshold"] = make(N, positive=True)
    if "TopK" in name:
        t |= {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(-1.0 if name == "AutoEncoderTopK" else 0.8)}
    if "Matryoshka" in name:
        t["group_sizes"] = torch.tensor([5, 7, 8])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(t, folder / "ae.pt")
    trainer = {
        "dict_class": name,
        "activation_dim": D,
        "dict_size": N,
        "layer": 3,
        "lm_name": "tiny",
        "submodule_name": "resid_post_layer_3",
    }
    write_json(folder, "config.json", {"trainer": {**trainer, "k": 4} if "TopK" in name else trainer, "buffer": {"ctx_len": 128}})
    t = wide(t)
    w_enc = t["encoder.weight"].T if linear else t["W_enc"]
    w_dec = t["decoder.weight"].T if linear else t["W_dec"]

    def encode(h: Tensor) -> Tensor:
        x = (h if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else h - t[bias]) @ w_enc
        if name == "GatedAutoEncoder":
            return torch.where(x + t["gate_bias"] > 0, relu(t["r_mag"].exp() * x + t["mag_bias"]), 0.0)
        pre = x + t["encoder.bias" if linear else "b_enc"]
        if name == "AutoEncoderTopK":
            return relu(top(pre, 4))
        return jump(pre, t["threshold"]) if "threshold" in t else relu(pre)

    return Case(folder, encode, lambda f, h: f @ w_dec + t[bias], ["layers.3.output"], ["layers.3.output"])


def openai(folder: Path, activation: str) -> Case:
    make = Numbers(8)
    t = {"pre_bias": make(D), "latent_bias": make(N), "encoder.weight": make(N, D), "decoder.weight": make(D, N)}
    statistics = {"stats_last_nonzero": torch.zeros(N, dtype=torch.long), "latents_mean_square": torch.zeros(N)}
    state: dict[str, Any] = {**t, **statistics, "activation": activation.split("_")[0]}
    if "TopK" in activation:
        state["activation_state_dict"] = {"k": 4, "postact_fn": "Identity" if "signed" in activation else "ReLU"}
    path = folder / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "7.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    t = wide(t)

    def parts(h: Tensor) -> tuple[Tensor, Tensor]:
        mean = h.mean(-1, keepdim=True)
        return mean, (h - mean).std(-1, keepdim=True)

    def encode(h: Tensor) -> Tensor:
        mean, deviation = parts(h)
        x = (h - mean) / (deviation + 1e-5) if "TopK" in activation else h
        pre = (x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
        return {"TopK": lambda: relu(top(pre, 4)), "TopK_signed": lambda: top(pre, 4)}.get(activation, lambda: relu(pre))()

    def decode(f: Tensor, h: Tensor) -> Tensor:
        mean, deviation = parts(h)
        out = f @ t["decoder.weight"].T + t["pre_bias"]
        return out * deviation + mean if "TopK" in activation else out

    return Case(path, encode, decode, ["layers.7.output"], ["layers.7.output"])


def llama_scope(folder: Path, act_fn: str, *, by_length: bool = True, hook_out: str = "blocks.15.hook_mlp_out") -> Case:
    make = Numbers(9)
    t = {"encoder.weight": make(N, D), "encoder.bias": make(N), "decoder.weight": make(D, N), "decoder.bias": make(D)}
    lengths = {"in": 3.0, "out": 3.0 if hook_out.endswith("mlp_out") else 0.5}
    hooks = {"hook_point_in": "blocks.15.hook_mlp_out", "hook_point_out": hook_out}
    config = {"act_fn": act_fn, "jump_relu_threshold": 0.75, "top_k": 4, "d_model": D, "d_sae": N, "norm_activation": "dataset-wise"}
    write_json(
        folder,
        "hyperparams.json",
        {**config, **hooks, "dataset_average_activation_norm": lengths, "sparsity_include_decoder_norm": by_length},
    )
    safetensors(folder, "checkpoints/final.safetensors", t)
    t = wide(t)
    length = t["decoder.weight"].norm(dim=0) if by_length else torch.ones(N, dtype=torch.float64)
    inside, outside = D**0.5 / lengths["in"], D**0.5 / lengths["out"]

    def encode(h: Tensor) -> Tensor:
        pre = h * inside @ t["encoder.weight"].T + t["encoder.bias"]
        if act_fn == "topk":
            return relu(top(pre * length, 4))
        return torch.where(pre * length > 0.75, relu(pre), 0.0) if act_fn == "jumprelu" else relu(pre)

    def decode(f: Tensor, h: Tensor) -> Tensor:
        return ((f / length if act_fn == "topk" else f) @ t["decoder.weight"].T + t["decoder.bias"]) / outside

    writes = "layers.15.mlp.output" if hook_out.endswith("mlp_out") else "layers.15.output"
    return Case(folder, encode, decode, ["layers.15.mlp.output"], [writes])


# ---- circuit-tracer


def circuit_tracer(folder: Path, kind: str) -> Case:
    make = Numbers(10)
    t = {"W_enc": make(N, D), "W_dec": make(N, D), "b_enc": make(N), "b_dec": make(D)}
    if kind == "jumprelu":
        t["activation_function.threshold"] = make(N, scale=0.5)  # some of them negative
    if kind == "skip":
        t["W_skip"] = make(D, D)
    safetensors(folder, "layer_0.safetensors", {name: tensor + 1 for name, tensor in t.items()})
    safetensors(folder, "layer_1.safetensors", t)
    hook = "ln2.hook_normalized" if kind == "without_gain" else "mlp.hook_in"
    (folder / "config.yaml").write_text(
        f"model_name: Qwen/Qwen3-0.6B\nmodel_kind: transcoder_set\nfeature_input_hook: {hook}\nfeature_output_hook: mlp.hook_out\nscan: x\n"
    )
    t, gain = wide(t), 1 + 0.3 * make(D)

    def encode(h: Tensor) -> Tensor:
        pre = (h / gain.double() if kind == "without_gain" else h) @ t["W_enc"].T + t["b_enc"]
        return torch.where(pre > t["activation_function.threshold"], pre, 0.0) if kind == "jumprelu" else relu(pre)

    def decode(f: Tensor, h: Tensor) -> Tensor:
        return f @ t["W_dec"] + t["b_dec"] + (h @ t["W_skip"].T if kind == "skip" else 0)

    arguments: dict[str, Any] = {"layer": 1, **({"gain": gain} if kind == "without_gain" else {})}
    return Case(folder, encode, decode, ["layers.1.mlp.input"], ["layers.1.mlp.output"], arguments, first=1)


def circuit_tracer_clt(folder: Path, kind: str) -> Case:
    make, is_jump = Numbers(11), kind == "jumprelu"
    w_enc, b_enc, b_dec = make(LAYERS, N, D), make(LAYERS, N), make(LAYERS, D)
    threshold, w_dec = make(LAYERS, N, positive=True), [make(N, LAYERS - layer, D) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        encoder = {f"W_enc_{layer}": w_enc[layer], f"b_enc_{layer}": b_enc[layer], f"b_dec_{layer}": b_dec[layer]}
        safetensors(folder, f"W_enc_{layer}.safetensors", {**encoder, **({f"threshold_{layer}": threshold[layer]} if is_jump else {})})
        safetensors(folder, f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": w_dec[layer]})
    text = "model_name: meta-llama/Llama-3.2-1B\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\n"
    (folder / "config.yaml").write_text(text + "feature_output_hook: hook_mlp_out\nscan: x\n")

    def encode(h: Tensor) -> Tensor:
        pre = torch.einsum("tld,lnd->tln", h, w_enc.double()) + b_enc.double()
        return (jump(pre, threshold.double()) if is_jump else relu(pre)).flatten(1)

    def decode(f: Tensor, h: Tensor) -> Tensor:
        f, out = f.view(-1, LAYERS, N), b_dec.double().repeat(len(f), 1, 1)
        for source in range(LAYERS):
            for target in range(source, LAYERS):
                out[:, target] += f[:, source] @ w_dec[source][:, target - source].double()
        return out

    pattern = "module:model.layers.{layer}.post_attention_layernorm:input"
    reads, writes = [pattern.format(layer=layer) for layer in range(LAYERS)], [f"layers.{layer}.mlp.output" for layer in range(LAYERS)]
    return Case(folder, encode, decode, reads, writes, {"reads": pattern}, first=1, shape=(LAYERS, D))


def _each(format: str, write: Callable[[Path, str], Case], kinds: str) -> dict[str, Callable[[Path], Case]]:
    """A case for each kind of a format."""
    return {f"{format} {kind}": lambda folder, kind=kind: write(folder, kind) for kind in kinds.split()}


CASES: dict[str, Callable[[Path], Case]] = {
    **_each("saelens", saelens, "standard gated jumprelu topk abstopk batchtopk matryoshka_batchtopk"),
    **_each("saelens", saelens, "transcoder skip_transcoder jumprelu_transcoder jumprelu_skip_transcoder"),
    "saelens without subtraction": lambda folder: saelens(folder, "jumprelu", apply_b_dec_to_input=False),
    "saelens layer_norm": lambda folder: saelens(folder, "topk", normalize_activations="layer_norm"),
    "saelens constant_norm_rescale": lambda folder: saelens(folder, "standard", normalize_activations="constant_norm_rescale"),
    "saelens scaled": lambda folder: saelens(folder, "standard", normalize_activations="expected_average_only_in", norm_factor=0.3),
    "saelens rescaled": lambda folder: saelens(folder, "topk", rescale_acts_by_decoder_norm=True),
    "saelens centred": lambda folder: saelens(folder, "standard", center=True),
    "saelens 5": lambda folder: saelens(folder, "standard", flat=True),
    **_each("gemma_scope", gemma_scope, "res mlp att embedding transcoders"),
    **_each("gemma_scope_2", gemma_scope_2, "sae transcoder transcoder_affine"),
    **_each("gemma_scope_2", gemma_scope_2_layers, "crosscoder clt clt_affine"),
    "qwen_scope": qwen_scope,
    **_each("sparsify", sparsify, "sae groupmax transcoder skip no_num_latents"),
    **_each("dictionary_learning", dictionary_learning, "AutoEncoder AutoEncoderNew GatedAutoEncoder JumpReluAutoEncoder"),
    **_each("dictionary_learning", dictionary_learning, "AutoEncoderTopK BatchTopKSAE MatryoshkaBatchTopKSAE"),
    **_each("openai", openai, "ReLU TopK TopK_signed"),
    **_each("llama_scope", llama_scope, "jumprelu topk relu"),
    "llama_scope without lengths": lambda folder: llama_scope(folder, "jumprelu", by_length=False),
    "llama_scope transcoder": lambda folder: llama_scope(folder, "jumprelu", hook_out="blocks.15.hook_resid_post"),
    **_each("circuit_tracer", circuit_tracer, "relu jumprelu skip without_gain"),
    **{f"circuit_tracer clt {kind}": lambda folder, kind=kind: circuit_tracer_clt(folder, kind) for kind in ("relu", "jumprelu")},
}
