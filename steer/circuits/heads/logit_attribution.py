"""Direct logit attribution: what embedding, heads, MLPs and biases add to a logit, or to the difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import whole_number
from steer.circuits.heads.runs import Keep, texts_of
from steer.circuits.linear import NormFormula, norm_formula
from steer.circuits.text_passes import TextPasses
from steer.circuits.texts import Batch, Prompts
from steer.errors import AnatomyError, ConfigError
from steer.lens.readout import Readout
from steer.model.anatomy import Anatomy
from steer.model.context import ForwardContext
from steer.model.site import Site

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the sum of absolute contributions, by dtype of the model
COARSE = 0.03  # for halves, whose stream rounds at every block


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part of a model adds to a logit (difference) at the last token of each text.

    Attributes:
        names: `embed`; `a3.h2`, a head; `a3.bias`, the bias of its W_O; `a3`, another mixer, or attention whose heads are not known; `m3`,
            an MLP; `bias`, of the final norm and the unembedding.
        contributions: [texts, parts] fp64.
        total: [texts] fp64, the model's own logit (difference), before a cap where it has one; rows of `contributions` add up to it.
        facts: readout and scale of the final norm.

    Example:
        >>> attribution = steer.logit_attribution(model, texts, tokenizer.encode(" he")[0])
        >>> torch.allclose(attribution.contributions.sum(1), attribution.total, atol=1e-3)
        True
    """

    names: tuple[str, ...]
    contributions: Tensor
    total: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """[texts]. Raises ConfigError for a part that there is not."""
        if name not in self.names:
            raise _no_such_part(name, self.names)
        return self.contributions[:, self.names.index(name)]

    def heads(self) -> Tensor:
        """[texts, layers, heads]; 0 where a layer has no such head."""
        heads = {i: tuple(map(int, name[1:].split(".h"))) for i, name in enumerate(self.names) if ".h" in name}
        layers, most = (
            max((layer for layer, _ in heads.values()), default=-1) + 1,
            max((head for _, head in heads.values()), default=-1) + 1,
        )
        made = self.contributions.new_zeros(len(self.contributions), layers, most)
        for i, (layer, head) in heads.items():
            made[:, layer, head] = self.contributions[:, i]
        return made

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The parts that add most on average, either way."""
        whole_number(n, "the number of parts", least=1)
        mean = self.contributions.mean(0)
        return [(self.names[i], float(mean[i])) for i in mean.abs().argsort(descending=True)[:n].tolist()]

    def __str__(self) -> str:
        return f"logit difference {float(self.total.mean()):+.3f}: " + ", ".join(f"{name} {value:+.3f}" for name, value in self.top(8))


def logit_attribution(
    model: nn.Module,
    texts: Prompts,
    right: int | Sequence[int],
    wrong: int | Sequence[int] | None = None,
    *,
    tokenizer: Any = None,
    max_tokens: int = 4096,
) -> LogitAttribution:
    """Splits the logit of a token at the last token of each text, less that of another one, over what wrote to the residual stream.

    The final norm divides by what it divides by for the whole stream, which makes the split linear; a post-norm of attention likewise.

    Args:
        right, wrong: token ids, one for all texts or one for each. Without `wrong` the logit itself is split.

    Raises:
        AnatomyError: contributions do not add up to the model's own logits, or its final norm or readout is not known.
        SiteError: something that writes to the stream has no site. ConfigError: a token that there is not.

    Example:
        >>> he, she = (tokenizer.encode(word)[0] for word in (" he", " she"))
        >>> attribution = steer.logit_attribution(model, texts, he, she)
        >>> attribution.top(5)  # (part, mean share of the logit difference)
    """
    readout = Readout.of(model)
    passes = TextPasses(model, readout.anatomy, texts_of(model, texts, tokenizer), max_tokens=max_tokens)
    return _Attribution(readout, passes).run(right, wrong)


class _Attribution:
    def __init__(self, readout: Readout, passes: TextPasses) -> None:
        self.passes, self.readout, self.anatomy, self.texts = passes, readout, readout.anatomy, passes.texts
        self.written = self.anatomy.written_sites()
        self.split = {site.layer: Site("attn.z", site.layer) for site in self.written if self._has_heads(site)}
        last = Site("output", self.anatomy.n_layers - 1)
        around = [last] + ([] if self.anatomy.final_norm is None else [Site("final_norm")])
        self.sites = [*self.written, *self.split.values(), *around]
        self.names: list[str] = []

    def _has_heads(self, site: Site) -> bool:
        if site.layer is None or site.part == "mlp.output" or len(self.anatomy.parts[site.layer].attention()) != 1:
            return False
        writer = self.anatomy.writer(site.layer, "attn")
        return writer.heads is not None and writer.projection is not None

    def run(self, right: int | Sequence[int], wrong: int | Sequence[int] | None) -> LogitAttribution:
        rows = self.readout.unembedding
        signed = [(1, _tokens(right, len(self.texts), len(rows)))]
        if wrong is not None:
            signed.append((-1, _tokens(wrong, len(self.texts), len(rows))))
        contributions: dict[int, Tensor] = {}  # [parts] by text
        totals = torch.zeros(len(self.texts), dtype=torch.float64)
        for numbers in self.passes.batches(range(len(self.texts))):
            batch = self.passes.batch(numbers)
            made, total = self._of_batch(batch, [(sign, tokens[numbers]) for sign, tokens in signed])
            contributions |= dict(zip(numbers, made, strict=True))
            totals[numbers] = total
        stacked = torch.stack([contributions[i] for i in range(len(self.texts))])
        facts = {"readout": repr(self.readout), "final_norm": "scale of the whole stream"}
        return LogitAttribution(tuple(self.names), stacked, totals, facts)

    def _of_batch(self, batch: Batch, signed: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """[rows, parts] and [rows], on the CPU. signed: +1 or -1, and a token for each row."""
        kept, logits = self._last_tokens(batch)
        stream = kept[Site("output", self.anatomy.n_layers - 1)]  # [rows, width]
        with torch.no_grad():
            parts = self._parts(kept)
            formula = self._formula(stream, kept)
        self.names = [*parts, "bias"]
        unembedding = self._difference(self.readout.unembedding, signed).to(stream.device)  # [rows, width]
        written = torch.stack([part.to(stream.device) for part in parts.values()]).double()  # [parts, rows, width]
        normed = written if formula is None else formula.numerator(written) / formula.denominator(stream.double())
        made = (normed * unembedding).sum(-1).T  # [rows, parts]
        bias = torch.zeros_like(made[:, :1])
        if formula is not None and formula.bias is not None:
            bias += unembedding @ formula.bias.double()[:, None]
        if isinstance(of_head := getattr(self.readout.head, "bias", None), Tensor):
            bias += self._difference(of_head.detach()[:, None], signed).to(bias.device)
        made = torch.cat([made, bias], 1).cpu() * self.readout.scale
        total = torch.stack([sign * logits.gather(1, tokens[:, None])[:, 0] for sign, tokens in signed]).sum(0)
        self._check(made, total, stream.dtype)
        return made, total

    def _difference(self, of_tokens: Tensor, signed: Sequence[tuple[int, Tensor]]) -> Tensor:
        """[rows, ...] fp64 from [vocabulary, ...]: what a tensor has of the right tokens, less that of the wrong ones."""
        return torch.stack([sign * of_tokens[tokens.to(of_tokens.device)].double() for sign, tokens in signed]).sum(0)

    def _last_tokens(self, batch: Batch) -> tuple[dict[Site, Tensor], Tensor]:
        """[rows, width] at the last token of each text, by site, and [rows, vocabulary] logits there before any cap, fp64 on the CPU."""
        kept: dict[Site, Tensor] = {}
        last = batch.mask.sum(1) - 1  # texts are padded at the right
        functions = {site: _KeepAt(kept, site, last) for site in self.sites}
        logits = self.passes.run_batch(batch, functions, gradients=False, last_token=True)
        assert logits is not None  # no function ends the pass
        of_last, cap = logits[:, 0].double().cpu(), self.readout.cap
        return kept, of_last if cap is None else cap * torch.atanh(of_last / cap)

    def _parts(self, kept: dict[Site, Tensor]) -> dict[str, Tensor]:
        """What was written to the stream, [rows, width] by name."""
        parts: dict[str, Tensor] = {}
        for site in self.written:
            if site.layer is None:
                parts["embed"] = kept[site]
            elif site.part == "mlp.output":
                parts[f"m{site.layer}"] = kept[site]
            elif site.layer in self.split:
                of_heads = self.anatomy.head_outputs(site.layer, kept[self.split[site.layer]][:, None])[:, :, 0]  # [heads + 1, rows, width]
                parts |= {f"a{site.layer}.h{head}": h for head, h in enumerate(of_heads[:-1])}
                parts[f"a{site.layer}.bias"] = of_heads[-1]
            else:
                parts[f"a{site.layer}"] = kept[site]
        return parts

    def _formula(self, stream: Tensor, kept: dict[Site, Tensor]) -> NormFormula | None:
        norm = self.anatomy.final_norm
        return None if norm is None else norm_formula(norm, stream, kept[Site("final_norm")])

    def _check(self, made: Tensor, total: Tensor, dtype: torch.dtype) -> None:
        """Raises AnatomyError where contributions do not add up."""
        error = (made.sum(1) - total).abs() / made.abs().sum(1).clamp_min(1e-30)
        if not float(error.max()) <= TOLERANCE.get(dtype, COARSE):
            text = int(error.argmax())
            raise _does_not_add_up(self.anatomy, float(made[text].sum()), float(total[text]))


class _KeepAt(Keep):
    """Keeps one token of each row. places: [rows]."""

    def __init__(self, kept: dict[Site, Tensor], site: Site, places: Tensor) -> None:
        super().__init__(kept, site)
        self.places = places

    def __call__(self, h: Tensor, ctx: ForwardContext) -> None:
        self.kept[self.site] = h.detach()[torch.arange(len(h), device=h.device), self.places.to(h.device)]


def _tokens(tokens: int | Sequence[int], n_texts: int, size: int) -> Tensor:
    """[texts] token ids."""
    several = [tokens] * n_texts if isinstance(tokens, int) else list(tokens)
    if len(several) != n_texts:
        raise _other_number(len(several), n_texts)
    for token in several:
        whole_number(token, "a token of logit attribution")
        if token >= size:
            raise _no_such_token(token, size)
    return torch.tensor(several)


# ---- errors


def _does_not_add_up(anatomy: Anatomy, made: float, total: float) -> AnatomyError:
    return AnatomyError(
        f"what the parts of this {anatomy.kind} add to the logit does not add up to it",
        expected=f"{total:.6g}, as the model says",
        found=f"{made:.6g}, the sum over embedding, heads, MLPs and biases",
        remedy="a plan that is attached at residual sites, or a part that has no site, adds the rest; detach plans, or run in float32",
    )


def _no_such_part(name: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"no part '{name}' in a logit attribution", expected="embed, a<layer>.h<head>, a<layer>.bias, m<layer> or bias",
                       found=name, remedy=f"the last one here is {names[-2]}")  # fmt: skip


def _other_number(found: int, n_texts: int) -> ConfigError:
    return ConfigError("the tokens of a logit attribution do not fit the texts", expected=f"one, or {n_texts}", found=found,
                       remedy="pass one token for all texts, or one for each")  # fmt: skip


def _no_such_token(token: int, size: int) -> ConfigError:
    return ConfigError("a token of logit attribution does not exist", expected=f"0 to {size - 1}", found=token,
                       remedy="take its id from the tokenizer of this model")  # fmt: skip
