"""Interchange interventions and DAS: a planted subspace is found, its controls find nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from circuits.component_helpers import rows
from families import FAMILIES
from hand import hook_count
from torch import Tensor, nn

from steer.circuits import DAS, Pairs, fit_das, interchange
from steer.errors import ConfigError, SiteError, WidthError, WrongModelError
from steer.model.tokens import Row

CHOICES = (5, 9)
QUIET = {"progress": False}


def planted() -> tuple[nn.Module, Tensor]:
    """A llama whose blocks add next to nothing: it says 5 where the last token has a positive coordinate along a direction, else 9."""
    model = FAMILIES["llama"]()
    generator = torch.Generator().manual_seed(2)
    direction = nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        embedding = torch.randn(96, 32, generator=generator)
        signs = torch.tensor([1.0 if token % 2 else -1.0 for token in range(96)])
        model.model.embed_tokens.weight.copy_(embedding - (embedding @ direction)[:, None] * direction + 3 * signs[:, None] * direction)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[5], model.lm_head.weight[9] = direction, -direction
    return model, direction


def sign_pairs(model: nn.Module, count: int = 40) -> tuple[Pairs, list[int]]:
    """The last token alone is swapped; the label is what its source says."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(10, 96, (2, count, 4), generator=generator).tolist()
    base, source = ([Row(tuple(text), 0) for text in texts] for texts in drawn)
    pairs = Pairs.of(model, base, source, positions=[[None, None, None, "last"]] * count)
    return pairs, [5 if row.ids[-1] % 2 else 9 for row in source]


def test_das_finds_the_planted_subspace_and_its_controls_do_not(tmp_path):
    model, direction = planted()
    pairs, labels = sign_pairs(model)
    before = copy.deepcopy(model.state_dict())
    das = fit_das(model, "layers.1.output", pairs, labels, rank=1, steps=50, lr=0.05, **QUIET)
    assert das.accuracy == das.accuracies["train"] == das.accuracies["all_of_the_activation"] == 1
    assert float((das.subspace @ direction).abs()) > 0.9
    torch.testing.assert_close(das.subspace @ das.subspace.T, torch.eye(1))
    controls = [das.accuracies[name] for name in ("placebo", "arbitrary_labels", "untrained")]
    assert max(controls) <= 0.85 and das.accuracies["without_swap"] < 0.8
    assert all(f"{value:.3f}" in repr(das) for value in controls)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hook_count(model) == 0 and all(parameter.grad is None for parameter in model.parameters())

    again = DAS.load(das.save(tmp_path / "das"))
    assert torch.equal(again.subspace, das.subspace) and again.accuracies == das.accuracies and again.site == das.site
    others, more_labels = sign_pairs(model, 10)
    assert again.interchange(model, others, more_labels).accuracy == 1
    ids = torch.tensor([[20, 31]])
    with torch.no_grad(), again.ablation_plan(model).attached(model):
        logits = model(ids).logits[0, -1]
    plain = model(ids).logits[0, -1].detach()
    assert abs(float(logits[5] - logits[9])) < 0.4 * abs(float(plain[5] - plain[9]))  # the variable is gone
    with pytest.raises(WrongModelError):
        again.ablation_plan(FAMILIES["llama"](num_hidden_layers=2))
    with pytest.warns(UserWarning, match="subspace was made on[\\s\\S]*is a bfloat16 copy"):
        again.ablation_plan(copy.deepcopy(model).bfloat16())


def test_a_swap_of_everything_is_patching_and_of_a_subspace_moves_that_alone():
    model, direction = planted()
    pairs, labels = sign_pairs(model)
    assert interchange(model, "layers.0.output", pairs, labels).accuracy == 1
    assert interchange(model, "layers.0.output", pairs, labels, direction).accuracy == 1
    across = torch.linalg.qr(torch.cat([direction[:, None], torch.eye(32)[:, :4]], 1))[0][:, 1:].T
    unmoved = interchange(model, "layers.0.output", pairs, labels, across)
    assert torch.equal(unmoved.swapped, unmoved.before) and unmoved.accuracy == unmoved.accuracy_before < 0.8
    in_block = interchange(model, "layers.1.attn.z", pairs, labels)
    assert in_block.accuracy == in_block.accuracy_before and "chance 0.500" in repr(in_block)


def test_more_dimensions_and_other_sites_are_learned_orthonormal():
    model, _ = planted()
    pairs, labels = sign_pairs(model, 16)
    first = fit_das(model, "embed", pairs, labels, rank=3, steps=3, placebos=1, **QUIET)
    torch.testing.assert_close(first.subspace @ first.subspace.T, torch.eye(3), rtol=0, atol=1e-5)
    again = fit_das(model, "embed", pairs, labels, rank=3, steps=3, placebos=1, **QUIET)
    assert torch.equal(first.subspace, again.subspace) and first.accuracies == again.accuracies
    assert not torch.equal(first.subspace, fit_das(model, "embed", pairs, labels, 3, steps=3, placebos=1, seed=1, **QUIET).subspace)


def test_what_cannot_be_learned_is_refused():
    model, direction = planted()
    pairs, labels = sign_pairs(model, 8)
    site = "layers.1.output"
    for match, call in (
        ("rank", lambda: fit_das(model, site, pairs, labels, 33, **QUIET)),
        ("one class", lambda: fit_das(model, site, pairs, [5] * 8, **QUIET)),
        ("8 labels", lambda: interchange(model, site, pairs, labels[:7])),
        ("none of the choices", lambda: interchange(model, site, pairs, labels, choices=[5, 6])),
        ("held", lambda: fit_das(model, site, pairs, labels, held_out=1.5, **QUIET)),
        ("too few pairs", lambda: fit_das(model, site, pairs, labels, held_out=0.0, **QUIET)),
        ("learning rate", lambda: fit_das(model, site, pairs, labels, lr=0.0, **QUIET)),
        ("no token", lambda: Pairs.of(model, rows(4, 4), rows(4, 4), positions=[[None] * 4] * 2)),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    with pytest.raises(WidthError):
        interchange(model, site, pairs, labels, direction[:31])
    with pytest.raises(SiteError):
        fit_das(model, "layers.9.output", pairs, labels, **QUIET)
    assert hook_count(model) == 0
