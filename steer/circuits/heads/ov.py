"""OV scores: what each head writes when it looks at one token alone: its successor (Gould et al. 2023), or the token again (copying).

A text of one token has no pattern: a head passes on its value. Vectors that are put in front of every block of such a text therefore give
what W_OV of every head makes of them, in one pass and in any family: with the input norm of the block, shared key-value heads and
post-norms as they are. The logits leave out the denominator of the final norm, which is one positive number for all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from steer.checks import one_of, whole_number
from steer.circuits.heads.names import attention_layers
from steer.circuits.heads.ordinals import Task, ordinal_tasks, successions
from steer.circuits.heads.runs import Keep
from steer.circuits.heads.scores import HeadScores
from steer.circuits.linear import norm_formula
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Texts
from steer.errors import AnatomyError, ConfigError, SiteError
from steer.lens.readout import Readout
from steer.model.anatomy import Anatomy
from steer.model.block_sites import heads_of
from steer.model.context import ForwardContext
from steer.model.load import tokenizer_of
from steer.model.site import Site
from steer.model.tokens import Row

ALONG = 0.99  # cosine of a value with what its head passes on; halves round
STARTS = ("mlp0", "embedding")  # what the first MLP makes of an embedding, or the embedding itself


def successor_scores(
    model: nn.Module, tasks: Mapping[str, Task] | None = None, *, tokenizer: object = None, start: str = "mlp0"
) -> HeadScores:
    """Share of ordinal tokens whose successor gets the largest logit of its task's tokens from a head that looks at them, for all heads.

    Args:
        tasks: tokens in their order, by name; numbers, ranks, days, months and letters by default.
        start: what heads look at: `mlp0`, what the first MLP makes of the token's embedding, or `embedding`.

    Returns:
        Scores `successor`, over all tasks, and one for each task by its name. facts: tokens, and the score of chance.

    Raises:
        TokenizerError: no task is made of single tokens. ConfigError: tasks without a succession.
        AnatomyError: no attention, or a final norm that is not known.

    Example:
        >>> numbers = [tokenizer.encode(f" {word}")[0] for word in "one two three four".split()]
        >>> scores = steer.successor_scores(model, {"numbers": numbers}, tokenizer=tokenizer)
        >>> scores.top("successor", 3)
    """
    one_of(start, STARTS, "`start` of OV scores")
    chosen = ordinal_tasks(tokenizer_of(model) if tokenizer is None else tokenizer) if tasks is None else tasks
    for name, task in chosen.items():
        if not successions(task):
            raise _no_succession(name)
    ids = sorted({token for task in chosen.values() for token in task if token is not None})
    if not ids:
        raise _no_tokens()
    logits = _ov_logits(model, ids, start)
    place = {token: number for number, token in enumerate(ids)}
    right, by_task, chance = [], {}, 0.0
    for name, task in chosen.items():
        among = torch.tensor([place[token] for token in task if token is not None])
        pairs = torch.tensor([(place[one], place[following]) for one, following in successions(task)])
        best = among[logits[:, :, pairs[:, 0]][..., among].argmax(-1)]  # [layers, heads, pairs]
        is_right = torch.where(logits[:, :, :1, 0].isnan(), float("nan"), (best == pairs[:, 1]).double())
        by_task[name] = is_right.mean(-1)
        right.append(is_right)
        chance += len(pairs) / len(among)
    together = torch.cat(right, -1)
    facts = {"tokens": {name: list(task) for name, task in chosen.items()}, "chance": chance / together.shape[-1], "start": start}
    return HeadScores({"successor": together.mean(-1), **by_task}, facts=facts)


def copy_scores(
    model: nn.Module, tokens: Sequence[int] | None = None, *, n: int = 128, seed: int = 0, start: str = "embedding"
) -> HeadScores:
    """How much heads write the token that they look at, for all heads, on some tokens.

    Args:
        tokens: token ids; `n` random ones by default.
        start: see `successor_scores`.

    Returns:
        Scores `copy`, the share of tokens whose own logit is the largest among these tokens, and `copy_eigenvalue`, sum(l) / sum(|l|) over
        the eigenvalues l of the logits from these tokens to these tokens (Elhage et al. 2021): 1 where all copy, -1 where all suppress.

    Raises:
        ConfigError: fewer than two tokens, or one that there is not. AnatomyError: as `successor_scores`.

    Example:
        >>> scores = steer.copy_scores(model, n=16)
        >>> scores.top("copy", 3)
    """
    one_of(start, STARTS, "`start` of OV scores")
    whole_number(n, "the number of tokens", least=2)
    size = len(Readout.of(model).unembedding)
    ids = list(dict.fromkeys(tokens)) if tokens is not None else _random_tokens(size, n, seed)
    if len(ids) < 2:
        raise _no_tokens()
    logits = _ov_logits(model, ids, start)  # [layers, heads, tokens, tokens]
    own = (logits.argmax(-1) == torch.arange(len(ids))).double().mean(-1)
    missing = logits[:, :, 0, 0].isnan()
    values = torch.linalg.eigvals(logits.nan_to_num())  # [layers, heads, tokens]
    ratio = values.real.sum(-1) / values.abs().sum(-1).clamp_min(1e-30)
    scores = {name: score.masked_fill(missing, float("nan")) for name, score in (("copy", own), ("copy_eigenvalue", ratio))}
    return HeadScores(scores, facts={"tokens": len(ids), "chance": 1 / len(ids), "start": start})


def _random_tokens(size: int, n: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def _ov_logits(model: nn.Module, ids: Sequence[int], start: str) -> Tensor:
    """[layers, heads, tokens, tokens] fp64, logits (columns) of heads that look at single tokens (rows); NaN where there is no head."""
    readout = Readout.of(model)
    anatomy = readout.anatomy
    layers = attention_layers(anatomy)
    texts = Texts([Row((token,), 0) for token in ids])
    passes = TextPasses(model, anatomy, texts, max_tokens=len(ids))
    batch = passes.batch(range(len(ids)))
    kept: dict[Site, Tensor] = {}
    last = Site("output", anatomy.n_layers - 1)
    values = {layer: site for layer in layers if _is_known(anatomy, site := Site("attn.v", layer))}
    sites = [*(Site("attn.z", layer) for layer in layers), *values.values(), last] + (
        [] if anatomy.final_norm is None else [Site("final_norm")]
    )
    with torch.no_grad():
        vectors = _embeddings(anatomy, batch.ids)
        put = {Site("input", layer): _Put(vectors) for layer in range(anatomy.n_layers)}
        if start == "mlp0":
            into_first: dict[Site, Tensor] = {}
            first = {Site("input", 0): _Put(vectors), Site("mixer.output", 0): _Put(torch.zeros_like(vectors))}
            end = Site("mlp.output", 0)
            passes.run_batch(batch, {**first, end: Keep(into_first, end, stop=True)}, gradients=False)
            put = {site: _Put(into_first[end]) for site in put}
        passes.run_batch(batch, {**put, **{site: Keep(kept, site) for site in sites}}, gradients=False)
        formula = None if anatomy.final_norm is None else norm_formula(anatomy.final_norm, kept[last], kept[Site("final_norm")])
        unembedding = readout.unembedding[torch.tensor(ids)].double().cpu()  # [tokens, width]
        by_layer = {}
        for layer in layers:
            if layer in values:
                _check_passes_values_on(anatomy, layer, kept[values[layer]], kept[Site("attn.z", layer)])
            written = anatomy.head_outputs(layer, kept[Site("attn.z", layer)])[:-1, :, 0].double()  # [heads, tokens, width]
            numerator = written if formula is None else formula.numerator(written)
            by_layer[layer] = numerator.cpu() @ unembedding.T
    most = max(len(logits) for logits in by_layer.values())
    made = torch.full((anatomy.n_layers, most, len(ids), len(ids)), float("nan"), dtype=torch.float64)
    for layer, logits in by_layer.items():
        made[layer, : len(logits)] = logits * readout.scale
    return made


def _is_known(anatomy: Anatomy, site: Site) -> bool:
    """Latent attention has values, but no projection that gives them alone."""
    try:
        anatomy.point(site)
    except SiteError:
        return False
    return True


def _check_passes_values_on(anatomy: Anatomy, layer: int, values: Tensor, z: Tensor) -> None:
    """Raises AnatomyError where a head does something else with a value than to scale it, as a gate of the looking token does."""
    heads = heads_of(anatomy, layer)
    v = values.float().unflatten(-1, (heads.n_kv_heads, heads.head_dim)).repeat_interleave(heads.n_heads // heads.n_kv_heads, -2)
    along = torch.cosine_similarity(v, z.float().unflatten(-1, (heads.n_heads, heads.head_dim)), dim=-1)  # [tokens, 1, heads]
    if not float(along.min()) >= ALONG:
        raise _other_than_values(anatomy, layer, float(along.min()))


class _Put:
    """Hook function that puts vectors in the place of an activation, of every text of one token."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors  # [rows, 1, width]

    def __call__(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        return self.vectors.to(h)


def _embeddings(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """[rows, 1, width] embeddings of tokens, without positions."""
    if anatomy.embedding is None:
        raise _no_embedding(anatomy, "none")
    vectors = anatomy.embedding(ids)
    if vectors.shape[-1] != anatomy.width:
        raise _no_embedding(anatomy, f"one of width {vectors.shape[-1]}")
    return vectors.detach()


# ---- errors


def _no_succession(name: str) -> ConfigError:
    return ConfigError(f"the ordinal task '{name}' has no succession", expected="two token ids in a row", found="fewer",
                       remedy="give the tokens in their order, None for words of several tokens")  # fmt: skip


def _no_tokens() -> ConfigError:
    return ConfigError("too few tokens for OV scores", expected="at least two different ones", found="fewer", remedy="pass more tokens")


def _other_than_values(anatomy: Anatomy, layer: int, cosine: float) -> AnatomyError:
    return AnatomyError(
        f"what heads of block {layer} of this {anatomy.kind} write does not depend on the token alone that they look at",
        expected="attention that passes on its values, by a factor each",
        found=f"another vector before W_O, at a cosine of {cosine:.3f} to the value",
        remedy="a gate of the token that looks cannot be part of an OV score: ablate heads with head_effects instead",
    )


def _no_embedding(anatomy: Anatomy, found: str) -> AnatomyError:
    return AnatomyError(
        f"the token embedding of this {anatomy.kind} is not what its residual stream starts with",
        expected=f"an embedding of width {anatomy.width}",
        found=found,
        remedy="OV scores need one; score heads by their patterns with head_scores",
    )
