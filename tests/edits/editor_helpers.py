"""What the tests of editors share: tiny models with covariances, edits of them, and keys and values to compute with."""

from __future__ import annotations

import functools
import tempfile

import torch
from edits.edit_helpers import CONTEXTS, FACTS, model_of, running_text
from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

from steer.edits import (
    Covariance,
    EditBench,
    Guards,
    ValueSettings,
    edit_facts,
    fact_keys,
)
from steer.edits.locate import answer_row
from steer.model.likelihood import response_logprobs

TOKENIZER = tiny_tokenizer()
STRONG = ValueSettings(steps=12, clamp=3.0, kl=0.0, weight_decay=0.0)
TEXTS = running_text(20)


def fitted(model, layers):
    with tempfile.TemporaryDirectory() as folder:
        return Covariance.fit(model, TOKENIZER, TEXTS, layers, folder=folder, progress=False)


@functools.cache
def covariance_of(family):
    """Of the models of two blocks; those of one family all have the same weights."""
    return fitted(model_of(family), [0, 1])


# what the model of three blocks does not say already
UNSAID = (FACTS[0], FACTS[1].with_target("sun"), FACTS[2])


def of_three_blocks():
    model = FAMILIES["llama"]()
    return model, fitted(model, [0, 1])


def edit(model, facts=FACTS, editor="memit", layers=(0,), family="llama", **options):
    settings = {"contexts": CONTEXTS, "covariance": covariance_of(family), "guards": Guards(drift=None), **options}
    return edit_facts(model, TOKENIZER, list(facts), editor=editor, layers=list(layers), **settings)


def probabilities(model, facts=FACTS):
    return response_logprobs(model, [answer_row(TOKENIZER, fact.prompt, fact.target) for fact in facts], pad=0).exp()


def keys_of(model, layer=0, weighting="plain_half", facts=FACTS):
    return fact_keys(model, TOKENIZER, list(facts), CONTEXTS, [layer], weighting)[layer].combined.double()


def values_of(model, settings=STRONG, layer=0, facts=FACTS):
    bench = EditBench(model, TOKENIZER, [layer], CONTEXTS)
    return torch.stack([value.delta for value in bench.values(list(facts), layer, settings)]).double()


def inverse(covariance, layer=0, ridge=1e-4):
    moment = covariance.moment(layer)
    return torch.linalg.inv(moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)))


def close(delta, expected):
    torch.testing.assert_close(delta.change().double(), expected, atol=1e-6 * float(expected.abs().max()) + 1e-9, rtol=1e-4)
