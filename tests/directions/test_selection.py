"""Selection by effect: what is measured equals one candidate and one text at a time, and what fails a filter is not chosen."""

import json

import pytest
import torch
from directions.direction_helpers import GOOD, SITE, controlled, running_text
from hand import hook_count

from steer.directions import Direction, select
from steer.directions.contrast import text_digest
from steer.errors import ConfigError, ContrastError, WidthError
from steer.intervene import Ablate, Add, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.site import Site
from steer.model.tokens import Row

TOKENS = [GOOD, 12]


def prompts(seed: int, count: int = 5) -> list[Row]:
    return [Row(row.ids, len(row.ids)) for row in running_text(count, seed)]


def bench() -> tuple[torch.nn.Module, list[Direction]]:
    """A model that tends to say GOOD, and candidates of which the second carries that."""
    model, planted = controlled()
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.5 * planted.vector
    noise = [torch.randn(32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    sites = ["layers.0.output", SITE, SITE, "layers.2.output"]
    vectors = [noise[0] / noise[0].norm(), 3 * planted.vector, noise[1] / noise[1].norm(), 3 * planted.vector]
    return model, [Direction(Site.parse(site), v, "planted", -1) for site, v in zip(sites, vectors, strict=True)]


def odds(logits: torch.Tensor) -> float:
    p = logits.double().softmax(-1)[TOKENS].sum()
    return float((p / (1 - p)).log())


@torch.no_grad()
def by_hand(model, rows, plan=None) -> torch.Tensor:
    """[texts, vocabulary] logits after each text, one at a time."""
    if plan is None:
        return torch.stack([model(torch.tensor([row.ids])).logits[0, -1] for row in rows])
    with plan.attached(model):
        return by_hand(model, rows)


def test_scores_equal_one_candidate_at_a_time():
    model, candidates = bench()
    showing, lacking = prompts(1), prompts(2)
    selection = select(model, candidates, showing=showing, lacking=lacking, tokens=TOKENS, progress=False)
    everywhere = Anatomy.find(model).sites("embed", "layers.*.attn.output", "layers.*.mlp.output")
    assert selection.showing == pytest.approx(sum(map(odds, by_hand(model, showing))) / 5, abs=1e-4)
    assert selection.lacking == pytest.approx(sum(map(odds, by_hand(model, lacking))) / 5, abs=1e-4)
    plain = by_hand(model, lacking).double().log_softmax(-1)
    for direction, candidate in zip(candidates, selection.candidates, strict=True):
        ablated = Plan([Intervention(Ablate(direction.vector), site) for site in everywhere])
        added = Plan(Intervention(Add(direction.vector), direction.site))
        assert candidate.bypass == pytest.approx(sum(map(odds, by_hand(model, showing, ablated))) / 5, abs=1e-3)
        assert candidate.induce == pytest.approx(sum(map(odds, by_hand(model, lacking, added))) / 5, abs=1e-3)
        after = by_hand(model, lacking, ablated).double().log_softmax(-1)
        assert candidate.kl == pytest.approx(float((plain.exp() * (plain - after)).sum(-1).mean()), abs=1e-4)
        assert (candidate.site, candidate.span) == (str(direction.site), -1)
    assert hook_count(model) == 0


def test_ablation_leaves_nothing_of_the_direction_in_the_residual_stream():
    """Ablation covers every writer of the stream, so no later site has any part of the direction."""
    model, candidates = bench()
    everywhere = Anatomy.find(model).sites("embed", "layers.*.attn.output", "layers.*.mlp.output")
    with Plan([Intervention(Ablate(candidates[1].vector), site) for site in everywhere]).attached(model), torch.no_grad():
        states = model(torch.tensor([prompts(1)[0].ids]), output_hidden_states=True).hidden_states
    for state in states[:-1]:
        assert float((state @ candidates[1].unit).abs().max()) < 1e-5


def test_the_direction_that_carries_the_behaviour_is_chosen():
    model, candidates = bench()
    selection = select(model, candidates, showing=prompts(1), lacking=prompts(2), tokens=TOKENS, max_kl=50.0, progress=False)
    rejected = [candidate.rejected for candidate in selection.candidates]
    assert rejected[3] == "too late in the model" and "does not bring the behaviour about" in rejected[0]
    assert rejected[1] == "" and selection.chosen is candidates[1]
    assert json.loads(json.dumps(selection.to_dict()))["chosen"] == 1
    strict = select(model, candidates, showing=prompts(1), lacking=prompts(2), tokens=TOKENS, max_kl=1e-4, progress=False)
    assert "KL" in strict.candidates[1].rejected and strict.to_dict()["chosen"] is None
    with pytest.raises(ConfigError, match=r"no candidate may be chosen[\s\S]*layers.2.output \(-1\): too late"):
        _ = strict.chosen


def test_a_repeated_token_counts_once():
    model, candidates = bench()
    once, twice = (
        select(model, candidates[:1], showing=prompts(1), lacking=prompts(2), tokens=tokens, progress=False)
        for tokens in (TOKENS, [*TOKENS, *TOKENS])
    )
    assert once.candidates == twice.candidates and once.showing == twice.showing


def test_neutral_prompts_of_their_own():
    model, candidates = bench()
    a, b = (
        select(model, candidates[:1], showing=prompts(1), lacking=prompts(2), tokens=TOKENS, neutral=neutral, progress=False)
        for neutral in (None, prompts(3))
    )
    assert a.candidates[0].induce == b.candidates[0].induce and a.candidates[0].kl != b.candidates[0].kl


def test_many_candidates_share_passes(monkeypatch):
    model, candidates = bench()
    monkeypatch.setattr("steer.directions.selection.SLOTS", 3)
    few = select(model, candidates, showing=prompts(1), lacking=prompts(2), tokens=TOKENS, progress=False)
    monkeypatch.undo()
    many = select(model, candidates, showing=prompts(1), lacking=prompts(2), tokens=TOKENS, progress=False)
    for a, b in zip(few.candidates, many.candidates, strict=True):
        assert (a.bypass, a.induce, a.kl) == pytest.approx((b.bypass, b.induce, b.kl), abs=1e-4)


def test_bad_input_is_named():
    model, candidates = bench()
    good = {"showing": prompts(1), "lacking": prompts(2), "tokens": TOKENS}
    seen = frozenset(map(text_digest, good["lacking"]))
    wide = Direction(Site.parse("layers.0.mlp.neurons"), torch.ones(64), "x", -1)
    fitted = Direction(candidates[0].site, candidates[0].vector, "x", -1, {}, seen)
    for chosen, options, error, message in [
        ([], {}, ConfigError, "nothing to select"),
        (candidates, {"tokens": []}, ConfigError, "no token opens the behaviour"),
        (candidates, {"showing": []}, ContrastError, "no prompts in `showing`"),
        ([wide], {}, WidthError, "no direction of the residual stream"),
        ([fitted], {}, ContrastError, "the prompts in `lacking` use texts"),
    ]:
        with pytest.raises(error, match=message):
            select(model, chosen, **{**good, **options}, progress=False)
