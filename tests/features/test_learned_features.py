"""Learned feature steering: adapters that begin as the identity, penalties on what they change, tables, and controls of random features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from features.feature_plans import CHOSEN, SITE, autoencoder, numbers
from hand import padded
from torch import Tensor

import steer
from steer.errors import ConfigError
from steer.features import GainPenalty, Untrained, random_features
from steer.intervene import Plan
from steer.model.tokens import Row
from steer.training.loss_run import LossRun
from steer.training.ranks import Ranks


def plan_of(operator: Any, site: str = SITE, **options: Any) -> Plan:
    return Plan(steer.Intervention(operator, site, **options))


def texts(count: int = 5, tokens: int = 9) -> list[Row]:
    ids = torch.randint(7, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(3))
    return [Row(tuple(row[: tokens - number % 3]), 2) for number, row in enumerate(ids.tolist())]


@pytest.mark.parametrize("kind", ["gain", "offset"])
def test_an_adapter_begins_as_the_identity_and_learns(kind: str) -> None:
    model, batch = FAMILIES["llama"]().requires_grad_(False), padded("right")
    plan = plan_of(steer.FeatureAdapter(autoencoder(untrained=Untrained(first=1)), CHOSEN, kind).train())
    plain = model(**batch, use_cache=False)
    optimizer = torch.optim.Adam(plan.parameters(), lr=0.02)
    losses = []
    with plan.attached(model) as attachment:
        assert torch.equal(model(**batch, use_cache=False).logits, plain.logits)
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert set(attachment.fired().values()) == {9 * (int(batch["attention_mask"].sum()) - 3)}
    assert losses[0] == float(plain.loss) and losses[-1] < losses[0] - 0.02


def learned_adapter(**options: Any) -> steer.FeatureAdapter:
    return steer.FeatureAdapter(
        autoencoder(untrained=Untrained(first=1)), CHOSEN, adapter=0.1 * numbers(3, 32, seed=1), bias=numbers(3, seed=2), **options
    )


def test_the_table_of_an_adapter_tells_its_changes_over_tokens(tmp_path: Path) -> None:
    model, rows = FAMILIES["llama"](), texts()
    plan = Plan.load(plan_of(learned_adapter().train()).save(tmp_path / "plan"))
    operator = plan.interventions[0].operator
    with torch.no_grad():
        states = [model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2][0, 2:] for row in rows]
    h = torch.cat(states)
    x = h / h.norm(dim=-1, keepdim=True) * 32**0.5
    changes = x @ (0.1 * numbers(3, 32, seed=1)).T + numbers(3, seed=2)  # [tokens, 3]
    table = operator.table(model, rows, span="response")
    assert [row.feature for row in table] == [CHOSEN[place] for place in changes.abs().mean(0).argsort(descending=True).tolist()]
    for row in table:
        column = changes[:, CHOSEN.index(row.feature)]
        assert torch.allclose(torch.tensor(row[1:]), torch.stack([column.mean(), column.min(), column.max()]), atol=1e-5)


def test_a_table_leaves_out_the_tokens_that_no_edit_touches() -> None:
    model, rows = FAMILIES["llama"](), [Row((11, 12), 0)]
    (first, *_), dictionary = learned_adapter().table(model, rows), autoencoder(untrained=Untrained(first=1))
    assert first.least == first.mean == first.most  # one token is left
    assert len(steer.FeatureAdapter(dictionary, CHOSEN).table(model, texts())) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steer.FeatureAdapter(autoencoder(), CHOSEN, "scale"), "gain"),
        (lambda: steer.FeatureAdapter(autoencoder(), CHOSEN, adapter=torch.zeros(2, 32)), "another shape"),
        (lambda: steer.FeatureAdapter("sae", CHOSEN), "made of no dictionary"),
        (lambda: GainPenalty(plan_of(learned_adapter())), "no coefficient"),
        (lambda: GainPenalty(plan_of(steer.Add(torch.ones(32))), l1=1.0), "whose gains are penalised"),
        (lambda: GainPenalty(plan_of(learned_adapter()), l1=1.0, intervention="x"), "whose gains are penalised"),
        (lambda: GainPenalty(plan_of(learned_adapter()), l1=-1.0), "l1"),
        (
            lambda: GainPenalty(
                Plan([steer.Intervention(steer.Add(torch.ones(32)), SITE), steer.Intervention(learned_adapter(), SITE)]), l1=1.0
            ),
            "cannot read what",
        ),
        (lambda: GainPenalty(plan_of(steer.FeatureGains(autoencoder(), CHOSEN, torch.ones(2, 3))), l1=1.0), "row slot"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def penalised(plan: Plan, penalty: GainPenalty, batch: dict[str, Tensor], *, plan_first: bool) -> Tensor:
    model = FAMILIES["llama"]().requires_grad_(False)
    run = LossRun([penalty])
    if not plan_first:
        run.attach(model, Ranks())
    with plan.attached(model):
        if plan_first:
            run.attach(model, Ranks())
        run.batch_start(batch)
        model(**batch, use_cache=False)
        added = run.added(torch.zeros(()))
    run.detach()
    return added


@pytest.mark.parametrize("plan_first", [True, False])
@pytest.mark.parametrize("kind", ["gain", "offset"])
def test_a_penalty_is_on_what_the_adapter_reads_whoever_was_attached_first(kind: str, plan_first: bool) -> None:
    batch = padded("right")
    plan = plan_of(learned_adapter(kind=kind).train(), scope="response")
    added = penalised(plan, GainPenalty(plan, l1=0.5, l2=0.25, weight=2.0), batch, plan_first=plan_first)
    with torch.no_grad():
        h = FAMILIES["llama"]()(**batch, output_hidden_states=True, use_cache=False).hidden_states[2]
        changes = plan.interventions[0].operator.changes(h)[batch["labels"] != -100]
    expected = 2 * (0.5 * changes.abs().sum(-1) + 0.25 * changes.square().sum(-1)).mean()
    assert float(added.detach()) == pytest.approx(float(expected), rel=1e-5) and float(expected) > 0.1
    added.backward()
    assert all(float(parameter.grad.norm()) > 0 for parameter in plan.parameters())


def test_a_penalty_of_constant_gains() -> None:
    plan = plan_of(steer.FeatureGains(autoencoder(), CHOSEN, [1.5, 0.0, 1.0], [0.0, 0.0, -2.0]).train())
    added = penalised(plan, GainPenalty(plan, l1=1.0, l2=0.1), padded("right"), plan_first=True)
    assert float(added.detach()) == pytest.approx(1.5 + 2.0 + 0.1 * (0.25 + 1 + 4))


def test_a_penalty_keeps_gains_near_the_identity() -> None:
    model, batch = FAMILIES["llama"]().requires_grad_(False), padded("right")
    found = []
    for l2 in (1e-9, 20.0):
        plan = plan_of(steer.FeatureGains(autoencoder(), CHOSEN).train())
        run = LossRun([GainPenalty(plan, l2=l2)])
        optimizer = torch.optim.SGD(plan.parameters(), lr=0.01)
        run.attach(model, Ranks())
        with plan.attached(model):
            for _ in range(10):
                optimizer.zero_grad()
                run.added(model(**batch, use_cache=False).loss).backward()
                optimizer.step()
                run.batch_end()
        run.detach()
        found.append(sum(abs(row.gain - 1) + abs(row.offset) for row in plan.interventions[0].operator.table()))
    assert 0 < found[1] < 0.5 * found[0]


# ---- feature ablation in fine-tuning (CAFT)


def fine_tuned(plan: Plan | None) -> torch.nn.Module:
    model, batch = FAMILIES["llama"]().train(), padded("right")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attachment = None if plan is None else plan.attach(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    if attachment is not None:
        attachment.detach()
    return model.eval()


def caft(operator: Any) -> Plan:
    return plan_of(operator, phases=("train",))


def test_features_ablated_in_training_alone_change_what_is_learned_and_nothing_at_use() -> None:
    dictionary, batch = autoencoder("relu"), padded("right")
    dictionary.density = torch.full((40,), 0.5)
    plan = caft(steer.AblateFeatures(dictionary, CHOSEN))
    plain, ablated = fine_tuned(None), fine_tuned(plan)
    span = fine_tuned(caft(steer.Ablate(dictionary.decoder_rows(CHOSEN))))  # the span of decoder rows, whether features are on or not
    controls = [fine_tuned(caft(steer.AblateFeatures(dictionary, drawn))) for drawn in random_features(dictionary, CHOSEN, draws=2)]
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (plain, ablated, span, *controls)]
    assert all((weights[i] - weights[j]).abs().max() > 1e-4 for i in range(5) for j in range(i))
    with torch.no_grad():
        unhooked = ablated(**batch, use_cache=False).logits
        with plan.attached(ablated) as attachment:
            assert torch.equal(ablated(**batch, use_cache=False).logits, unhooked)
            ablated.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert attachment.fired() == {f"ablate_features@{SITE}": 0}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ablated.modules())


def test_a_span_of_decoder_rows_is_projected_out_while_training() -> None:
    model, batch = FAMILIES["llama"]().train(), padded("right")
    rows = autoencoder().decoder_rows(CHOSEN)
    basis = torch.linalg.qr(rows.T)[0]  # [width, 3]
    seen = []
    with caft(steer.Ablate(rows)).attached(model):
        handle = model.model.layers[2].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(**batch, use_cache=False).loss.backward()
        handle.remove()
    real = batch["attention_mask"].bool()
    inside = (seen[0].detach() @ basis).abs()
    assert float(inside[real].max()) < 1e-4 < float(inside[~real].max())
