"""Head scores: planted heads are found, patterns are those of the model in every family, padding changes nothing, all is put back."""

import pytest
import torch
from circuits.head_helpers import planted_model
from families import FAMILIES
from hand import edited, hook_count, ids, padded, vector
from own_models import own_model
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

import steer
from steer.circuits.heads import Head, head_scores, repeated_tokens
from steer.circuits.heads.names import head_named, heads_named
from steer.circuits.heads.patterns import PatternReader
from steer.circuits.texts import Texts, rows_of
from steer.errors import AnatomyError, ConfigError
from steer.intervene import Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.tokens import Row


def patterns_of(model, rows) -> dict[tuple[int, int], torch.Tensor]:
    """[heads, tokens, tokens] by layer and text."""
    found = {}

    def read(layer, pattern, batch):
        for row, text in enumerate(batch.prompts.tolist()):
            length = int(batch.mask[row].sum())
            found[layer, text] = pattern[row, :, :length, :length].clone()

    PatternReader(model, Texts(rows)).run(read)
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_planted_heads_have_the_highest_scores(implementation):
    model = planted_model(implementation)
    scores = head_scores(model, texts=repeated_tokens(model, n=4, length=7))
    assert scores.top("previous_token", 1)[0][0] == Head(0, 1)
    assert scores.top("induction", 1)[0][0] == Head(1, 0)
    assert scores.top("duplicate_token", 1)[0][0] == Head(1, 1)
    assert scores["previous_token"][0, 1] > 0.95
    assert scores["induction"][1, 0] > 0.9
    assert 0.4 < scores["duplicate_token"][1, 1] < 0.55  # half of it, since a token is the same as itself


def test_scores_are_the_mean_attention_along_a_diagonal_of_repeated_tokens():
    model, length = FAMILIES["llama"](), 6
    rows = [Row(row.ids[1:], 0) for row in repeated_tokens(model, n=3, length=length)]
    scores = head_scores(model, texts=rows)
    patterns = torch.stack([torch.stack([patterns_of(model, rows)[layer, text] for layer in range(3)]) for text in range(3)])
    for kind, offset in (("induction", length - 1), ("duplicate_token", length), ("previous_token", 1)):
        start = 0 if kind == "previous_token" else length - offset
        along = patterns.diagonal(-offset, -2, -1)[..., start:].mean(-1)
        assert torch.allclose(scores[kind], along.mean(0).double(), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_of_every_family_are_those_of_its_eager_attention(family):
    """Mistral and gemma have a window of 4 tokens, gemma2 a softcap, falcon one key-value head for all."""
    model, rows = FAMILIES[family](), [Row(tuple(ids(1, length, length)[0].tolist()), 0) for length in (9, 5)]
    patterns = patterns_of(model, rows)
    config = model.config
    own = config._attn_implementation
    config._attn_implementation = "eager"
    for text, row in enumerate(rows):
        expected = model(torch.tensor([row.ids]), output_attentions=True).attentions
        for layer in range(3):
            assert torch.allclose(patterns[layer, text], expected[layer][0], atol=1e-5)
    config._attn_implementation = own


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(side):
    model = FAMILIES["qwen2"]()
    batch = {**padded(side), "input_ids": padded(side)["input_ids"].clone()}
    batch["input_ids"][batch["attention_mask"] == 1] %= 7  # tokens that come again
    rows = rows_of(model, batch)
    alone = [head_scores(model, texts=[row]) for row in rows]
    together = head_scores(model, texts=batch)
    for kind in together.scores:
        assert torch.allclose(together[kind], torch.stack([scores[kind] for scores in alone]).nanmean(0), atol=1e-6)


def test_implementation_mode_and_hooks_are_put_back_after_an_interrupt():
    model = FAMILIES["llama"]().train()

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PatternReader(model, Texts(repeated_tokens(model, 1, 4))).run(interrupt)
    assert model.config._attn_implementation == "sdpa"
    assert hook_count(model) == 0
    assert all(module.training for module in model.modules())


def test_half_precision_is_proven_too():
    model = FAMILIES["qwen3"]().to(torch.bfloat16)
    assert bool(head_scores(model, "previous_token")["previous_token"].isfinite().all())


def test_an_attention_that_changes_its_values_is_refused():
    model = FAMILIES["llama"]()
    with (
        edited(model.model.layers[1].self_attn.v_proj, lambda v: 2 * v),
        pytest.raises(AnatomyError, match=r"head 1\.. .* cannot be proven"),
    ):
        head_scores(model)


def test_an_attention_that_gives_no_weights_is_refused():
    model = FAMILIES["llama"]()
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (output[0], None))
    with pytest.raises(AnatomyError, match="block 1 .* gives no pattern"):
        head_scores(model)
    with pytest.raises(AnatomyError, match="no block .* has attention"):
        head_scores(own_model("gpt"))


def test_texts_without_a_token_of_the_kind_are_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(ConfigError, match="no induction score"):
        head_scores(model, "induction", [Row((5, 6, 7), 0)])
    with pytest.raises(ConfigError, match="two tokens"):
        head_scores(model, "previous_token", [Row((5,), 0)])
    with pytest.raises(ConfigError, match="no prompts"):
        head_scores(model, texts=[])
    with pytest.raises(ConfigError, match="kind of a head score"):
        head_scores(model, "inducton")


def test_heads_that_are_not_there_are_refused():
    anatomy = Anatomy.find(FAMILIES["llama"]())
    assert heads_named(anatomy, ["2.3", "a0.h1", (1, 2)]) == [Head(2, 3), Head(0, 1), Head(1, 2)]
    assert str(head_named("a23.h3")) == "23.3"
    for name in ("3.0", "0.4"):
        with pytest.raises(ConfigError, match=f"no attention head {name}"):
            heads_named(anatomy, [name])
    with pytest.raises(ConfigError, match="no name of an attention head"):
        heads_named(anatomy, ["head 3"])
    with pytest.raises(ConfigError, match="names of heads"):
        heads_named(anatomy, 3)


def test_patterns_are_those_of_a_model_with_a_plan():
    model, rows = FAMILIES["llama"](), repeated_tokens(FAMILIES["llama"](), 1, 4)
    plain = patterns_of(model, rows)
    plan = Plan([Intervention(steer.Add(vector(16)), "layers.0.attn.v"), Intervention(steer.Add(vector()), "layers.0.attn.z")])
    with plan.attached(model):
        planned = patterns_of(model, rows)
    assert torch.allclose(plain[0, 0], planned[0, 0], atol=1e-6)
    assert not torch.allclose(plain[2, 0], planned[2, 0], atol=1e-3)


def test_attention_with_sinks_is_read_and_gated_attention_is_refused():
    """A sink takes a part of the weights of gpt-oss; qwen3-next gates what its heads mix."""
    small = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sinks = GptOssForCausalLM(
        GptOssConfig(**small, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, eos_token_id=2)
    ).eval()
    pattern = patterns_of(sinks, [Row((5, 6, 7, 8, 9, 10), 0)])[0, 0]
    assert bool((pattern.sum(-1) < 0.999).all() and (pattern.sum(-1) > 0.2).all())
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = ["linear_attention", "full_attention"]
    config = Qwen3NextConfig(**small, **experts, **linear, num_hidden_layers=2, num_experts=2, layer_types=kinds)
    with pytest.raises(AnatomyError, match=r"head 1\.. .* cannot be proven"):
        head_scores(Qwen3NextForCausalLM(config).eval())
