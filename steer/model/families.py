"""Where model families keep their parts: one row per naming scheme, tried in order; an unlisted model that uses one of these schemes
is found by structure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attribute names. `layers`, `embed` and `norm` hang on the decoder, everything else on a block or on its attention or MLP.

    Attributes:
        members: `config.model_type` values that this row was proven on.
        qkv: names of three projections, or of one fused projection.
        fused: layout of a fused projection: `blocks` = [Q | K | V], `heads` = per head [q | k | v], `groups` = per key-value group
            [q ... q | k | v].
        mlp_in, mlp_out: modules whose input and output are those of the MLP; `down` is the projection that reads the neurons.
        post_attn, post_mlp: norms applied to what attention and MLP write, before it is added to the residual stream.
    """

    name: str
    members: tuple[str, ...]
    layers: str = "layers"
    embed: str = "embed_tokens"
    norm: str = "norm"
    attn: str = "self_attn"
    out: str = "o_proj"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: str | None = None
    mlp_in: str = "mlp"
    mlp_out: str = "mlp"
    down: str = "mlp.down_proj"
    post_attn: str | None = None
    post_mlp: str | None = None


FAMILIES = (
    Family(
        "sandwich",
        ("gemma2", "gemma3_text", "olmo2", "olmo3"),
        post_attn="post_attention_layernorm",
        post_mlp="post_feedforward_layernorm",
    ),
    Family("llama", ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "mixtral", "qwen2_moe", "qwen3_moe", "olmo", "granite")),
    Family("phi3", ("phi3",), qkv=("qkv_proj",), fused="blocks"),
    Family(
        "gpt2",
        ("gpt2",),
        layers="h",
        embed="wte",
        norm="ln_f",
        attn="attn",
        out="c_proj",
        qkv=("c_attn",),
        fused="blocks",
        down="mlp.c_proj",
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        embed="embed_in",
        norm="final_layer_norm",
        attn="attention",
        out="dense",
        qkv=("query_key_value",),
        fused="heads",
        down="mlp.dense_4h_to_h",
    ),
    Family(
        "falcon",
        ("falcon",),
        layers="h",
        embed="word_embeddings",
        norm="ln_f",
        attn="self_attention",
        out="dense",
        qkv=("query_key_value",),
        fused="groups",
        down="mlp.dense_4h_to_h",
    ),
    Family("opt", ("opt",), norm="final_layer_norm", out="out_proj", mlp_in="fc1", mlp_out="fc2", down="fc2"),
)
