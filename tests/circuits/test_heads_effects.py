"""Effects of heads are those of handwritten hooks, planted heads matter, every pattern has its check, direct attribution adds up."""

import pytest
import torch
from circuits.head_helpers import planted_model
from families import FAMILIES, HEAD_DIM
from hand import edited, hook_count, ids, padded, recorded

import steer
from steer.circuits.heads import Head, attention_patterns, head_effects, logit_attribution, repeated_tokens
from steer.circuits.texts import rows_of
from steer.errors import AnatomyError, ConfigError
from steer.intervene import Intervention, Plan
from steer.model.tokens import Row

TARGET = steer.LogitDifference(5, 9)


def rows(*lengths: int) -> list[Row]:
    return [Row(tuple(ids(1, length, seed)[0].tolist()), 0) for seed, length in enumerate(lengths)]


def by_hand(model, row, layer, head, new) -> float:
    """The target while a hook puts `new(columns)` into the columns of a head before W_O."""
    columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)

    def hook(module, args):
        z = args[0].clone()
        z[..., columns] = new(z[..., columns])
        return (z,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        value = float(TARGET(model(torch.tensor([row.ids])).logits[0], 0))
    handle.remove()
    return value


def values_of_group(model, row, layer, head) -> torch.Tensor:
    """[tokens, head_dim] of the key-value head that a query head reads; 4 query heads share 2."""
    site = f"layers.{layer}.attn.v"
    with recorded(model, [site]) as seen, torch.no_grad():
        model(torch.tensor([row.ids]))
    return seen[site][0, :, (head // 2) * HEAD_DIM : (head // 2 + 1) * HEAD_DIM]


# ---- effects


def test_ablations_are_those_of_handwritten_hooks():
    model, texts = FAMILIES["llama"](), rows(7, 5)
    effects = head_effects(model, ["1.3"], texts, TARGET, ablations=["zero", "mean"])
    z = []
    for row in texts:
        with recorded(model, ["layers.1.attn.z"]) as seen, torch.no_grad():
            model(torch.tensor([row.ids]))
        z.append(seen["layers.1.attn.z"][0, :, 3 * HEAD_DIM :])
    mean = torch.cat(z).mean(0)
    for text, row in enumerate(texts):
        clean = by_hand(model, row, 1, 3, lambda z: z)
        assert float(effects.clean[text]) == pytest.approx(clean, abs=1e-5)
        assert float(effects.changes["zero"][0, text]) == pytest.approx(by_hand(model, row, 1, 3, torch.zeros_like) - clean, abs=1e-5)
        assert float(effects.changes["mean"][0, text]) == pytest.approx(by_hand(model, row, 1, 3, lambda z: mean) - clean, abs=1e-5)


def test_heads_named_together_are_ablated_together():
    model, texts = FAMILIES["llama"](), rows(6)
    together = head_effects(model, [["1.0", "1.1", (1, 2), "1.3"]], texts, TARGET, ablations=["zero"])
    with edited(model.model.layers[1].self_attn.o_proj, torch.zeros_like), torch.no_grad():
        without = TARGET(model(torch.tensor([texts[0].ids])).logits[0], 0)
    assert float(together.clean + together.changes["zero"][0]) == pytest.approx(float(without), abs=1e-5)
    assert head_effects(model, (1, 2), texts, TARGET, ablations=["zero"]).groups == ((Head(1, 2),),)
    assert together.groups == ((Head(1, 0), Head(1, 1), Head(1, 2), Head(1, 3)),)


@pytest.mark.parametrize(("family", "window"), [("llama", 99), ("mistral", 4)])
def test_a_uniform_pattern_is_the_mean_of_the_values_that_the_head_can_see(family, window):
    model, (row,) = FAMILIES[family](), rows(8)
    effects = head_effects(model, ["1.2"], [row], TARGET, ablations=["uniform_pattern"])
    values = values_of_group(model, row, 1, 2)
    seen = torch.stack([values[max(0, i + 1 - window) : i + 1].mean(0) for i in range(len(values))])
    expected = by_hand(model, row, 1, 2, lambda z: seen[None]) - by_hand(model, row, 1, 2, lambda z: z)
    assert abs(expected) > 1e-4
    assert float(effects.mean("uniform_pattern")[0]) == pytest.approx(expected, abs=1e-5)


def test_the_mean_pattern_of_equal_texts_is_their_own():
    (row,) = rows(6)
    effects = head_effects(FAMILIES["qwen2"](), ["0.1", ["1.2", "2.0"]], [row, row], TARGET)
    assert float(effects.changes["mean_pattern"].abs().max()) < 1e-6
    assert float(effects.changes["uniform_pattern"].abs().min()) > 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_effect(side):
    model, batch = FAMILIES["gemma3"](), padded(side)
    together = head_effects(model, ["1.2"], batch, TARGET, ablations=["zero", "uniform_pattern"])
    for text, row in enumerate(rows_of(model, batch)):
        alone = head_effects(model, ["1.2"], [row], TARGET, ablations=["zero", "uniform_pattern"])
        for ablation in alone.changes:
            assert float(together.changes[ablation][0, text]) == pytest.approx(float(alone.changes[ablation][0, 0]), abs=1e-5)
    assert hook_count(model) == 0


def test_planted_heads_carry_what_is_said_again():
    model = planted_model()
    texts = repeated_tokens(model, n=4, length=7)
    effects = head_effects(model, ["0.1", "1.0", "0.0"], texts)
    previous, induction, other = effects.mean("mean").tolist()
    assert previous < -0.1 and induction < -0.1 and abs(other) < 0.01
    assert effects.of("1.0")["uniform_pattern"] < -0.1  # it is where it looks that matters


def test_what_cannot_be_ablated_is_refused():
    model, texts = FAMILIES["llama"](), rows(6, 4)
    with pytest.raises(ConfigError, match="mean pattern over one text"):
        head_effects(model, ["1.0"], texts[:1], TARGET)
    with pytest.raises(ConfigError, match="longer than those of the mean pattern"):
        head_effects(model, ["1.0"], texts[:1], TARGET, means_from=[texts[1], texts[1]])
    with pytest.raises(ConfigError, match="too short"):
        head_effects(model, ["1.0"], [Row((5,), 0)], ablations=["zero"])
    with pytest.raises(ConfigError, match="has no tokens"):
        head_effects(model, ["1.0"], [Row((), 0)], TARGET)
    with pytest.raises(ConfigError, match="ablation of heads"):
        head_effects(model, ["1.0"], texts, TARGET, ablations=["resample"])
    with pytest.raises(ConfigError, match="no attention heads"):
        head_effects(model, [], texts, TARGET)
    with pytest.raises(ConfigError, match="not ablated alone"):
        head_effects(model, ["1.0"], texts, TARGET, ablations=["zero"]).of("1.1")


# ---- patterns and their check


def test_every_pattern_has_its_check_and_its_place_on_a_page(tmp_path):
    pytest.importorskip("matplotlib")
    model = planted_model()
    patterns = attention_patterns(model, repeated_tokens(model, n=2, length=6), ["1.0", (0, 1)])
    assert patterns.heads == (Head(1, 0), Head(0, 1))
    assert float(patterns["1.0", 1][12, 7]) > 0.9  # behind the same token, which stands 6 before
    assert float(patterns[0, 1][5, 4]) > 0.9
    assert patterns.bytes == 2 * 2 * 13 * 13 * 4
    assert patterns.effects.of("1.0").keys() == {"zero", "mean", "uniform_pattern", "mean_pattern"}
    patterns.plot(tmp_path / "heads.svg", text=1)
    for page in ((tmp_path / "heads.svg").read_text(), patterns.html()):
        assert "mean pattern" in page and f"{patterns.effects.of('1.0')['zero']:+.3f}" in page
    assert patterns.html(heads=["0.1"]).count("<td style") == 13 * 13


def test_patterns_that_were_not_read_are_refused():
    model, texts = FAMILIES["llama"](), rows(6)
    patterns = attention_patterns(model, texts, ["1.0"], TARGET)
    assert set(patterns.effects.changes) == {"zero", "mean", "uniform_pattern"}  # a mean over one text is no other pattern
    with pytest.raises(ConfigError, match=r"head 1\.1 was not read"):
        patterns["1.1"]
    with pytest.raises(ConfigError, match="no text 1"):
        patterns["1.0", 1]
    with pytest.raises(ConfigError, match="more memory"):
        attention_patterns(model, texts, ["1.0"], TARGET, max_bytes=100)


# ---- direct logit attribution


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_attribution_adds_up_to_the_logit_of_every_family(family):
    """Gemma2 caps its logits, after what is split."""
    model, texts = FAMILIES[family](), rows(7, 4)
    made = logit_attribution(model, texts, [5, 6])
    cap = getattr(model.config, "final_logit_softcapping", None)
    for text, (row, token) in enumerate(zip(texts, (5, 6), strict=True)):
        with torch.no_grad():
            logit = float(model(torch.tensor([row.ids])).logits[0, -1, token])
        total = float(made.contributions[text].sum())
        assert logit == pytest.approx(total if cap is None else cap * torch.tanh(torch.tensor(total / cap)).item(), abs=1e-4)
    assert made.heads().shape == (2, 3, 4)


def test_direct_attribution_of_a_head_is_its_part_of_the_normed_stream():
    model, (row,) = FAMILIES["llama"](), rows(6)
    made = logit_attribution(model, [row], 5, 9)
    with recorded(model, ["layers.1.attn.z", "layers.2.output"]) as seen, torch.no_grad():
        model(torch.tensor([row.ids]))
    head = (
        seen["layers.1.attn.z"][0, -1, HEAD_DIM : 2 * HEAD_DIM]
        @ model.model.layers[1].self_attn.o_proj.weight[:, HEAD_DIM : 2 * HEAD_DIM].T
    )
    scale = (seen["layers.2.output"][0, -1].square().mean() + model.config.rms_norm_eps).sqrt()
    direction = model.lm_head.weight[5] - model.lm_head.weight[9]
    expected = float((head * model.model.norm.weight / scale @ direction).detach())
    assert float(made["a1.h1"][0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_attribution(side):
    model, batch = FAMILIES["gpt_neox"](), padded(side)
    together = logit_attribution(model, batch, 5, 9)
    alone = torch.cat([logit_attribution(model, [row], 5, 9).contributions for row in rows_of(model, batch)])
    assert torch.allclose(together.contributions, alone, atol=1e-5)


def test_what_direct_attribution_cannot_split_is_refused():
    model, texts = FAMILIES["llama"](), rows(5)
    add = Plan(Intervention(steer.Add(torch.ones(32)), "layers.1.output"))
    with add.attached(model), pytest.raises(AnatomyError, match="does not add up"):
        logit_attribution(model, texts, 5, 9)
    with pytest.raises(ConfigError, match="does not exist"):
        logit_attribution(model, texts, 96)
    with pytest.raises(ConfigError, match="do not fit the texts"):
        logit_attribution(model, texts, [5, 6])
    with pytest.raises(ConfigError, match="no part 'a9.h0'"):
        logit_attribution(model, texts, 5)["a9.h0"]
