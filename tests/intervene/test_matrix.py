"""The questions on which libraries for steering differ, put to this one: each has a right answer given by a hook written by hand."""

import pytest
import torch
import torch._dynamo
from families import FAMILIES
from hand import edited, hook_count, padded, vector
from peft import LoraConfig, get_peft_model

from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy

LAYER = 1


@pytest.fixture(params=["llama", "gpt2", "gemma2", "qwen3_moe", pytest.param("smollm2", marks=pytest.mark.real)])
def case(request):
    """(model, its block, vector, batch of texts left-padded)."""
    if request.param == "smollm2":
        model, tokenizer = request.getfixturevalue("smollm2")
        tokenizer.padding_side = "left"
        texts = ["The museum opens at nine o'clock in the morning", "She said"]
        batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
        yield model, model.model.layers[15], vector(576) * 3, batch, 15
    else:
        model = FAMILIES[request.param]()
        batch = padded("left")
        del batch["labels"]
        yield model, Anatomy.find(model).blocks[LAYER], vector(), batch, LAYER
    assert hook_count(model) == 0


def plan(v, layer) -> Plan:
    return Plan(Intervention(Add(v), f"layers.{layer}.output"))


def only(batch, row):
    return {name: tensor[row : row + 1, batch["attention_mask"][row].bool()] for name, tensor in batch.items()}


def placed(batch):
    """With positions that start at the first real token, which learned positions do not do by themselves."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def real(logits, batch):
    """The logits of real tokens: a hook written by hand edits padding, too."""
    return logits[batch["attention_mask"].bool()]


def by_hand(model, block, v, call):
    with torch.no_grad(), edited(block, lambda h: h + v):
        return call(model)


def test_exact_and_left_padded_and_called_as_a_trainer_does(case):
    """Row by row the batch equals the single text; `model(**batch)` itself is steered; afterwards nothing is."""
    model, block, v, batch, layer = case
    with torch.no_grad():
        plain = model(**batch).logits
        expected = by_hand(model, block, v, lambda m: m(**only(batch, 0)).logits)
        with plan(v, layer).attached(model):
            assert (model(**only(batch, 0)).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
            together = model(**placed(batch)).logits
            for row in range(len(together)):
                alone = model(**only(batch, row)).logits[0]
                assert torch.allclose(together[row, -len(alone) :], alone, atol=2e-3 if layer == 15 else 1e-4)
            assert not torch.allclose(real(model(**batch).logits, batch), real(plain, batch), atol=1e-2)
        assert torch.equal(model(**batch).logits, plain)


def test_generation_with_a_cache(case):
    model, block, v, batch, layer = case
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**batch, **options)
    expected = by_hand(model, block, v, lambda m: m.generate(**batch, **options))
    with plan(v, layer).attached(model) as steered:
        assert torch.equal(model.generate(**batch, **options), expected)
        assert steered.fired() == {f"add@layers.{layer}.output": int(batch["attention_mask"].sum()) + 5 * len(expected)}
    assert torch.equal(model.generate(**batch, **options), plain)


def test_an_exception_inside_a_block(case):
    model, block, v, batch, layer = case
    with torch.no_grad():
        plain = model(**batch).logits
    boom = Anatomy.find(model).blocks[layer + 1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), plan(v, layer).attached(model):
        model(**batch)
    boom.remove()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)


def test_saved_and_loaded(case, tmp_path):
    model, block, v, batch, layer = case
    expected = by_hand(model, block, v, lambda m: m(**batch).logits)
    loaded = Plan.load(plan(v, layer).save(tmp_path / "plan.safetensors"))
    with torch.no_grad(), loaded.attached(model):
        assert torch.allclose(real(model(**batch).logits, batch), real(expected, batch), atol=1e-4)


TINY = ["llama", "gpt2", "gemma2", "qwen3_moe"]


@pytest.mark.parametrize("family", TINY)
def test_three_steps_of_adamw(family, tiny):
    runs = []
    for library in (True, False):
        model = tiny(family).train()
        required_grad = [p.requires_grad for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        block = Anatomy.find(model).blocks[LAYER]
        losses = []
        with plan(vector(), LAYER).attached(model) if library else edited(block, lambda h: h + vector()):
            for _ in range(3):
                loss = model(**padded("right")).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert [p.requires_grad for p in model.parameters()] == required_grad
        runs.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    # Adam divides by the size of a gradient, so where that is zero up to rounding the sign of a step is free
    assert (runs[0][1] - runs[1][1]).abs().mean() < 1e-5


@pytest.mark.parametrize("first", ["adapter", "plan"])
def test_peft_in_either_order(first, tiny):
    model = tiny("llama")
    block = model.model.layers[LAYER]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    steered = plan(vector(), LAYER)
    if first == "plan":
        attachment = steered.attach(model)
    torch.manual_seed(0)
    peft = get_peft_model(model, config)
    if first == "adapter":
        attachment = steered.attach(peft)
    batch = padded("right")
    output = peft(**batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}
    attachment.detach()
    peft.zero_grad()
    with edited(block, lambda h: h + vector()):
        expected = peft(**batch)
        expected.loss.backward()
    assert torch.allclose(real(output.logits, batch), real(expected.logits, batch), atol=1e-5)
    assert any("layers.0" in name and "lora_B" in name and g.abs().sum() > 0 for name, g in gradients.items())
    assert all(torch.allclose(gradients[name], p.grad, atol=1e-6) for name, p in peft.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("order", ["compiled, then steered", "steered, then compiled"])
def test_compiled_either_way(order, tiny):
    torch._dynamo.reset()
    model = tiny("llama")
    batch = {"input_ids": padded()["input_ids"]}
    with torch.no_grad():
        plain = model(**batch).logits
        expected = by_hand(model, model.model.layers[LAYER], vector(), lambda m: m(**batch).logits)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        if order.startswith("compiled"):
            assert torch.allclose(compiled(**batch).logits, plain, atol=1e-5)
        with plan(vector(), LAYER).attached(model):
            assert torch.allclose(compiled(**batch).logits, expected, atol=1e-5)
        assert torch.allclose(compiled(**batch).logits, plain, atol=1e-5)
    torch._dynamo.reset()
