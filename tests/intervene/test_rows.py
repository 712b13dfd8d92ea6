"""Row slots: every row of a batch with its own vector and strength equals the single run that has them."""

import pytest
import torch
from hand import ids, padded, vector

from steer.errors import ConfigError, ContextError
from steer.intervene import Ablate, Add, Intervention, Plan

VECTORS = torch.stack([vector(seed=seed) for seed in range(3)])
SUBSPACES = torch.stack([torch.stack([vector(seed=seed), vector(seed=seed + 10)]) for seed in range(3)])
STRENGTHS = [0.5, -1.0, 2.0]


def slotted(kind: str, scope: str = "all") -> Plan:
    operator = Add(VECTORS) if kind == "add" else Ablate(SUBSPACES)
    return Plan(Intervention(operator, "layers.1.output", scope, strength=STRENGTHS))


def single(kind: str, slot: int, scope: str = "all") -> Plan:
    operator = Add(VECTORS[slot]) if kind == "add" else Ablate(SUBSPACES[slot])
    return Plan(Intervention(operator, "layers.1.output", scope, strength=STRENGTHS[slot]))


@pytest.mark.parametrize("kind", ["add", "ablate"])
@pytest.mark.parametrize("scope", ["all", "response"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 2, 0], [1, 1, 1]])
def test_each_row_equals_its_single_run(kind, scope, rows, tiny):
    model = tiny("llama")
    batch = padded("left")
    plan = slotted(kind, scope)
    with torch.no_grad():
        with plan.attached(model) as attachment:
            attachment.set_rows(rows)
            together = model(**batch).logits
        for row, slot in enumerate(rows):
            with single(kind, slot, scope).attached(model):
                alone = model(**batch).logits[row]
            real = batch["attention_mask"][row].bool()
            assert torch.allclose(together[row, real], alone[real], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_row_by_row(options, cache, tiny):
    """Beams and returned sequences follow the row of their prompt."""
    model = tiny("llama")
    batch = padded("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options = {**options, "max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    rows = [2, 0, 1]
    plan = slotted("add")
    with plan.attached(model) as attachment:
        attachment.set_rows(rows)
        together = model.generate(**inputs, **options)
    for row, slot in enumerate(rows):
        with single("add", slot).attached(model):
            alone = model.generate(**inputs, **options)
        share = len(alone) // 3
        assert torch.equal(together[row * share : (row + 1) * share], alone[row * share : (row + 1) * share])
    assert len({tuple(line) for line in together.tolist()}) > 1


def test_one_vector_with_a_strength_per_row(tiny):
    model = tiny("llama")
    plan = Plan(Intervention(Add(vector()), "layers.1.output", strength=[0.0, 1.0]))
    with torch.no_grad():
        plain = model(ids()).logits
        with plan.attached(model) as attachment:
            attachment.set_rows([1, 0])
            steered = model(ids()).logits
            assert attachment.fired() == {"add@layers.1.output": 7}  # the row of strength 0 does not count
            attachment.set_rows([0, 0])
            assert torch.equal(model(ids()).logits, plain)
            attachment.set_strength([1.0, 0.0])
            assert torch.allclose(model(ids()).logits[0], steered[0], atol=1e-6)
            assert attachment.fired() == {"add@layers.1.output": 7 + 14}
    assert torch.equal(steered[1], plain[1]) and not torch.allclose(steered[0], plain[0], atol=1e-3)


@pytest.mark.parametrize("task", ["forward", "generate"])
def test_each_row_has_a_plan_of_its_own(task, tiny):
    """Rows may differ in operators, sites and scopes: a strength of 0 switches an intervention off for a row."""
    model, batch = tiny("llama"), padded("left")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    edits = [
        {"operator": Add(4 * vector()), "site": "layers.1.output", "scope": "response"},
        {"operator": Ablate(vector(seed=2)), "site": "layers.0.attn.output", "scope": "prompt[-2:]"},
    ]
    plan = Plan([Intervention(**edits[0], strength=[1.0, 0.0, 0.0]), Intervention(**edits[1], strength=[0.0, 1.0, 0.0])])

    def run():
        if task == "forward":
            return list(model(**batch).logits)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return list(torch.stack(model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True).logits, 1))

    with torch.no_grad():
        plain = run()
        with plan.attached(model) as attachment:
            attachment.set_rows([1, 0, 2])  # the ablation, the addition, and nothing
            together = run()
        for row, slot in ((0, 1), (1, 0), (2, None)):
            alone = plain
            if slot is not None:
                with Plan(Intervention(**edits[slot])).attached(model):
                    alone = run()
                assert not torch.allclose(alone[row], plain[row], atol=1e-3)
            assert torch.allclose(together[row], alone[row], atol=1e-5)


def test_gradients_of_a_slotted_batch(tiny):
    """The gradient of a batch is the sum over its rows, each steered as on its own."""
    batch = padded("right")
    rows = [1, 2, 0]
    plan = slotted("add")
    weight = "model.layers.0.mlp.up_proj.weight"
    model = tiny("llama")
    with plan.attached(model) as attachment:
        attachment.set_rows(rows)
        model(**batch).logits[batch["attention_mask"].bool()].sum().backward()
    together = model.get_parameter(weight).grad.clone()
    total = torch.zeros_like(together)
    for row, slot in enumerate(rows):
        model.zero_grad()
        real = batch["attention_mask"][row].bool()
        with single("add", slot).attached(model):
            model(batch["input_ids"][row : row + 1, real]).logits.sum().backward()
        total += model.get_parameter(weight).grad
    assert torch.allclose(together, total, atol=1e-4)


def test_rows_must_be_said_and_fit(tiny):
    model = tiny("llama")
    plan = slotted("add")
    with plan.attached(model) as attachment:
        with pytest.raises(ContextError, match=r"3 row slots[\s\S]*set_rows"):
            model(ids(3))
        attachment.set_rows([0, 1, 2])
        model(ids(3))
        for batch in (2, 6):
            with pytest.raises(ContextError, match=rf"do not fit[\s\S]*{batch} rows[\s\S]*found: 3"):
                model(ids(batch), use_cache=False)
        for rows in ([0, 3], [-1], []):
            with pytest.raises(ConfigError, match="expected: 0 to 2"):
                attachment.set_rows(rows)
        with pytest.raises(ConfigError, match="strengths"):
            attachment.set_strength([1.0, 2.0])
    with pytest.raises(ConfigError, match=r"wrong number of strengths[\s\S]*1 or 3"):
        Intervention(Add(VECTORS), "layers.1.output", strength=[1.0, 2.0])


def test_rows_set_in_inference_mode_can_be_set_again_in_training(tiny):
    model = tiny("llama")
    plan = slotted("add")
    with plan.attached(model) as attachment:
        with torch.inference_mode():
            attachment.set_rows([0, 1])
            attachment.set_strength(2.0)
            model(ids())
        attachment.set_rows([1, 2])
        attachment.set_strength(1.0)
        model(ids(), labels=ids()).loss.backward()
        [intervention] = attachment.interventions
        assert (
            intervention.rows.tolist() == [1, 2]
            and set(intervention.strength.flatten().tolist()) == {1.0}
            and not intervention.rows.is_inference()
        )


def test_interventions_without_slots_are_left_alone_by_set_rows(tiny):
    model = tiny("llama")
    plan = Plan([Intervention(Add(VECTORS), "layers.0.output", strength=0.0), Intervention(Add(vector()), "layers.1.output")])
    with plan.attached(model) as attachment, torch.no_grad():
        attachment.set_rows([0, 1])
        steered = model(ids()).logits
    with Plan(Intervention(Add(vector()), "layers.1.output")).attached(model), torch.no_grad():
        assert torch.equal(model(ids()).logits, steered)
