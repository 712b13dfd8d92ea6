"""Operators whose tensors an optimiser learns, and all of them in compiled models."""

from collections.abc import Iterable

import pytest
import torch
import torch._dynamo
from hand import padded, vector
from intervene.operator_cases import CASES, applied
from torch._dynamo.utils import counters

from steer.intervene import Ablate, HeadShift, Intervention, LoReFT, Plan, ReftR1
from steer.intervene.low_rank import orthonormalised
from steer.intervene.operator import Operator, tensors_of_rows

LEARNED = [name for name, case in CASES.items() if case.make().learnable]
THREE = (0, 1, 2)


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def site_of(name: str) -> str:
    return "layers.1.attn.z" if name == "head_shift" else "layers.1.output"


def train(model, plan, steps=25, **options) -> list[float]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(plan.parameters(), **{"lr": 0.05, **options})
    losses = []
    with plan.attached(model):
        for _ in range(steps):
            loss = model(**padded("right")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", LEARNED)
def test_learned_by_an_optimiser_saved_and_used(name, tiny, tmp_path):
    model, batch = tiny("llama"), padded("right")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = Plan(Intervention(CASES[name].make().train(), site_of(name), strength=0.5))
    assert len(plan.parameters()) == len(plan.interventions[0].operator.learnable)
    losses = train(model, plan, lr=0.01)
    assert losses[-1] < losses[0] - 1e-4
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    logits = []
    for used in (plan, loaded):
        with torch.no_grad(), used.attached(model):
            logits.append(model(**batch).logits)
    assert torch.allclose(*logits, atol=1e-6)
    assert loaded.interventions[0].operator.parameters.keys() == plan.interventions[0].operator.parameters.keys()


def test_loreft_keeps_its_rows_orthonormal(tiny):
    operator = LoReFT.initial(32, rank=3).train()
    start = operator.tensors["rotation"].detach().clone()
    h = states(2, 5, 32)
    assert torch.allclose(applied(operator, h), h, atol=1e-5)  # nothing yet
    losses = train(tiny("llama"), Plan(Intervention(operator, "layers.1.output")))
    assert losses[-1] < losses[0] - 0.05
    learned = operator.tensors["rotation"].detach()
    assert (learned @ learned.mT - torch.eye(3)).abs().max() > 1e-2 and (learned - start).abs().max() > 1e-2
    read, rows = operator.read_and_write(operator.tensors)
    assert (rows @ rows.mT - torch.eye(3)).abs().max() < 1e-5
    assert torch.allclose(applied(Ablate(rows.detach()), learned), torch.zeros(3, 32), atol=1e-4)  # the same span
    assert torch.allclose(read, operator.tensors["weight"] - rows)


def test_rows_that_are_learned_turn_smoothly():
    """Householder's QR would turn a row round where its first entry changes sign."""
    rows = states(1, 2, 8)
    rows[0, 0, 0] = 1e-4
    mirrored = rows.clone()
    mirrored[0, 0, 0] = -1e-4
    assert (orthonormalised(rows) - orthonormalised(mirrored)).abs().max() < 1e-3
    assert torch.allclose(orthonormalised(orthonormalised(rows)), orthonormalised(rows), atol=1e-6)


def test_reft_r1_keeps_its_vector_of_length_one(tiny):
    operator = ReftR1(vector(), level=2.0).train()
    train(tiny("llama"), Plan(Intervention(operator, "layers.1.output")))
    assert operator.tensors["vector"].norm() > 1.05  # what the optimiser sees
    h = states(2, 3, 32)
    assert torch.allclose((applied(operator, h) - h).norm(dim=-1), torch.tensor(2.0), atol=1e-5)


def test_heads_that_were_not_chosen_are_not_learned(tiny):
    operator = HeadShift(states(1, 8), [2], 4).train()
    before = operator.tensors["vector"].detach().clone()
    train(tiny("llama"), Plan(Intervention(operator, "layers.1.attn.z")), weight_decay=0.5)
    learned = operator.tensors["vector"].detach().unflatten(-1, (4, 8))
    assert torch.equal(learned[:, [0, 1, 3]], torch.zeros(1, 3, 8))
    assert (learned[:, 2] - before.unflatten(-1, (4, 8))[:, 2]).abs().min() > 1e-3


# ---- compiled


def test_a_whole_graph_that_is_not_traced_again(tiny, unbroken):
    """All operators in one plan, each row of the batch with its own tensors, over changes of strength, tensors and row slots."""
    model, batch = tiny("llama"), padded("left")
    options = {"scope": "response", "strength": [0.1, 0.2, 0.1]}
    plan = Plan([Intervention(case.make(seeds=THREE), site_of(name), name=name, **options) for name, case in CASES.items()])
    seen = []
    with plan.attached(model) as attachment, torch.no_grad():
        attachment.set_rows([0, 1, 2])
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for change in (
            lambda: None,
            lambda: attachment.set_strength(0.2),
            lambda: attachment.set_strength(-0.3, "rotate"),
            lambda: changed(intervention.operator for intervention in plan.interventions),
            lambda: attachment.set_rows([2, 2, 0]),
        ):
            change()
            actual, expected = compiled(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
            assert torch.allclose(actual, expected, atol=1e-4)
            seen.append(actual)
    assert counters["stats"]["unique_graphs"] == 1
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(seen, seen[1:], strict=False))


def changed(operators: Iterable[Operator]) -> None:
    with torch.no_grad():
        for operator in operators:
            for tensor in operator.tensors.values():
                tensor.copy_(tensor * 0.9 + 0.01)


def test_gradients_of_a_compiled_graph(unbroken):
    """All operators with a soft mask, each of the same states: in sequence they take each other out of reach. Those that can learn do."""
    operators = [case.make() for case in CASES.values()]
    learned = [parameter for operator in operators if operator.learnable for parameter in operator.train().parameters.values()]

    def run(h: torch.Tensor, strength: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([operator.apply(h, strength, mask, tensors_of_rows(operator.tensors, None)) for operator in operators])

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    mask = torch.tensor([[1.0, 0.5, 0.0, 1.0]] * 2).unsqueeze(-1)
    for change in (lambda: None, lambda: changed(operators)):
        change()
        runs = []
        for call in (run, compiled):
            h = states(2, 4, 32).requires_grad_()
            new = call(h, torch.full((1, 1, 1), 0.3), mask)
            runs.append([new, *torch.autograd.grad((new * states(2, 4, 32, seed=1)).sum(), [h, *learned])])
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*runs, strict=True))
        assert all(tensor.abs().max() > 0 for tensor in runs[0])
    assert counters["stats"]["unique_graphs"] == 1
