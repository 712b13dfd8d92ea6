"""Learner: the weights of one dictionary while it is trained, its loss, and the dictionary that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from steer.errors import ConfigError
from steer.features.training.active import ActiveFeatures, decode_active, encode_active
from steer.features.training.dictionary_config import DictionaryConfig, generator
from steer.features.training.optimisation import Optimisation
from steer.features.training.sparsifier import SPARSIFIERS, Step
from steer.model.site import Site

if TYPE_CHECKING:
    from steer.features.training.activation_data import Calibration

AUX_FEATURES = 2  # dead features that model what is left over, as a multiple of k


@dataclass
class Processes:
    """The processes that share a batch. sum, largest: over all of them. gathered: [n] of each, put together; n may differ."""

    count: int = 1
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    largest: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gathered: Callable[[Tensor], Tensor] = lambda tensor: tensor


class Layer(nn.Module):
    """Encoder and decoder of the features that read together: all of a dictionary, or one layer of a cross-layer transcoder.

    Attributes:
        encoder: [features, d_in], decoder: [features, d_out]; several sites lie side by side in d_in and d_out.
        unseen: [features] tokens since each was on. on_count, largest: [features] how often and how strongly, since `count_from`.
    """

    def __init__(self, config: DictionaryConfig, d_in: int, d_out: int, tied: bool, random: torch.Generator) -> None:
        super().__init__()
        self.sparsifier = SPARSIFIERS.get(config.sparsifier)(config.width, config.k, **config.settings)
        rows = torch.randn(config.width, d_out, generator=random)
        self.decoder = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        first = self.decoder.detach().clone() if tied else torch.randn(config.width, d_in, generator=random) / d_in**0.5
        # where half of all features are on at first, their sum is about what they read
        self.encoder = nn.Parameter(first * min(1.0, 2 * d_in / config.width) if self.sparsifier.starts_dense else first)
        self.bias = nn.Parameter(torch.zeros(config.width)) if self.sparsifier.has_bias else None
        self.unseen: Tensor
        self.on_count: Tensor
        self.largest: Tensor
        self.register_buffer("unseen", torch.zeros(config.width, dtype=torch.long))
        self.register_buffer("on_count", torch.zeros(config.width, dtype=torch.long))
        self.register_buffer("largest", torch.zeros(config.width))

    def dead(self, after: int) -> Tensor:
        """[features] True at those that have not been on for so many tokens."""
        return self.unseen > after

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Takes the part along each decoder row off its gradient: their length is fixed."""
        if self.decoder.grad is not None:
            self.decoder.grad -= (self.decoder.grad * self.decoder).sum(1, keepdim=True) * self.decoder

    @torch.no_grad()
    def restore_norms(self) -> None:
        """Brings each decoder row back to length 1."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(1e-12))


class Learner(nn.Module):
    """One dictionary in training. A `batch` has activations [tokens, width] of each site.

    Activations are scaled to a mean length of sqrt(width) at each site; `dictionary_of` folds the scales in.

    Args:
        config: what it shall be.
        calibration: lengths and means of the activations.
        optimisation: of the run.

    Raises:
        ConfigError: a site whose activations are not captured.

    Example:
        >>> from steer.features.training import Calibration, DictionaryConfig, Learner, Optimisation
        >>> h = {steer.Site.parse("layers.12.output"): torch.randn(200, 36)}
        >>> learner = Learner(DictionaryConfig(["layers.12.output"], width=64, k=4), Calibration.of(h, outlier=5.0), Optimisation(steps=10))
        >>> learner.dead_share()
    """

    def __init__(self, config: DictionaryConfig, calibration: Calibration, optimisation: Optimisation) -> None:
        super().__init__()
        self.config, self.optimisation = config, optimisation
        self.reads: tuple[Site, ...] = config.reads  # type: ignore[assignment]
        self.writes: tuple[Site, ...] = config.writes  # type: ignore[assignment]
        for site in config.sites:
            if site not in calibration.scale:
                raise _site_not_captured(site, calibration)
        self.calibration = calibration
        # an outlier at any of its sites leaves a token out; a dictionary records one length for all that it reads
        self.max_norm = max(calibration.max_norm[site] for site in self.reads)
        self.max_norm_written = None if self.reads == self.writes else max(calibration.max_norm[site] for site in self.writes)
        d_in, d_out = (sum(len(calibration.mean[site]) for site in sites) for sites in (self.reads, self.writes))
        self.subtracts = config.architecture == "sparse_autoencoder"  # the decoder's bias comes off before encoding
        random = generator(optimisation.seed, "weights", config.name)
        if config.architecture == "cross_layer_transcoder":
            widths = [len(calibration.mean[site]) for site in self.writes]
            sizes = [(len(calibration.mean[site]), sum(widths[place:])) for place, site in enumerate(self.reads)]
        else:
            sizes = [(d_in, d_out)]
        self.layers = nn.ModuleList(Layer(config, *size, self.reads == self.writes, random) for size in sizes)
        self.bias = nn.Parameter(torch.cat([calibration.mean[site] * calibration.scale[site] for site in self.writes]))
        self.skip = nn.Parameter(torch.zeros(d_out, d_in)) if config.skip else None
        self.tokens_counted: Tensor
        self.register_buffer("tokens_counted", torch.tensor(0))

    # ---- activations

    def kept(self, batch: Mapping[Site, Tensor]) -> Tensor | None:
        """[tokens] True at those that are no outliers at any site; None when all are kept."""
        inside = [batch[site].norm(dim=-1) <= self.max_norm for site in self.reads]
        if self.max_norm_written is not None:
            inside += [batch[site].norm(dim=-1) <= self.max_norm_written for site in self.writes]
        kept = torch.stack(inside).all(0)
        return None if bool(kept.all()) else kept

    def scaled(self, batch: Mapping[Site, Tensor], sites: tuple[Site, ...], kept: Tensor | None) -> Tensor:
        """[kept tokens, d] activations of sites side by side, in the units of the training. kept: [tokens], what `kept` gives."""
        parts = [(batch[site] if kept is None else batch[site][kept]).float() * self.calibration.scale[site] for site in sites]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    # ---- loss

    def forward(self, batch: Mapping[Site, Tensor], number: int, processes: Processes) -> tuple[Tensor, dict[str, Tensor]]:
        """[] the loss at a step, and sums over the tokens of this process: squared error, variance, features on, tokens."""
        kept = self.kept(batch)
        x = self.scaled(batch, self.reads, kept)  # [tokens, d_in]
        y = x if self.reads == self.writes else self.scaled(batch, self.writes, kept)  # [tokens, d_out]
        n_tokens = int(processes.sum(torch.tensor(len(x), device=x.device)))
        step = self._step(number, n_tokens, processes)
        parts = [_LayerPass(self, index, x, step) for index in range(len(self.layers))]
        skipped = 0 if self.skip is None else nn.functional.linear(x, self.skip).float()
        errors = self._errors(parts, self.bias + skipped - y, lambda part: part.values, self.layers)
        loss = sum((error.square().sum() for error in errors), x.new_zeros(())) / len(errors)
        residual = errors[-1].detach()
        for part in parts:
            penalty = part.layer.sparsifier.penalty(part.values, part.pre, part.active.feature, step)
            loss = loss if penalty is None else loss + penalty
            if self.optimisation.aux and (left_over := self._auxiliary(part, residual)) is not None:
                loss = loss + self.optimisation.aux * left_over
        loss = loss + self._gate_loss(parts, y)
        self._observe(parts, step, processes)
        on = sum(part.is_on.sum() for part in parts)
        with torch.no_grad():
            sums = {"squared_error": residual.square().sum(), "squares": y.square().sum(), "sum": y.sum(0), "on": torch.as_tensor(on)}
        return loss * (processes.count / max(n_tokens, 1)), {**sums, "tokens": torch.tensor(len(x), device=x.device)}

    def _step(self, number: int, n_tokens: int, processes: Processes) -> Step:
        warmth = self.optimisation.warmth(number)
        k = min(self.config.k * (4 - 3 * warmth), self.config.width)
        return Step(k, warmth, n_tokens, processes.gathered)

    def _errors(self, parts: list[_LayerPass], rest: Tensor, values: Callable, layers: nn.ModuleList) -> list[Tensor]:
        """[tokens, d_out] the reconstruction minus what it should be: of each prefix of a Matryoshka dictionary, otherwise one.

        Args:
            rest: what is added to the decoded features.
            values: of a layer, its features.
        """
        if not self.config.prefixes:
            for part in parts:
                written = decode_active(values(part), part.layer.decoder, part.active)
                rest = rest + nn.functional.pad(written, (rest.shape[1] - written.shape[1], 0))
            return [rest]
        errors, start = [], 0
        (part,) = parts
        for end in self.config.prefixes:
            inside = (part.active.feature >= start) & (part.active.feature < end)
            rest = rest + decode_active(values(part)[inside], part.layer.decoder, part.active.part(inside))
            errors.append(rest)
            start = end
        return errors

    def _auxiliary(self, part: _LayerPass, residual: Tensor) -> Tensor | None:
        """Squared error of the dead features on what the others leave over; the highest few of each token take part, without their bias."""
        dead = part.layer.dead(self.optimisation.dead_after).nonzero()[:, 0]
        if not len(dead):
            return None
        x = part.x if not self.subtracts else part.x + self.bias.detach() - self.bias
        pre = nn.functional.linear(x, part.layer.encoder[dead]).float()  # [tokens, dead]
        if (
            part.layer.bias is not None
        ):  # left out of the value, or a feature that it keeps off would never come back; it learns as if added
            bias = part.layer.bias[dead]
            pre = pre + bias - bias.detach()
        highest, places = pre.topk(min(len(dead), AUX_FEATURES * self.config.k), dim=1)
        features = torch.zeros_like(pre).scatter(1, places, highest.relu())
        target = residual[:, residual.shape[1] - part.layer.decoder.shape[1] :]
        return (features @ part.layer.decoder[dead] + target).square().sum()

    def _gate_loss(self, parts: list[_LayerPass], y: Tensor) -> Tensor:
        """Squared error of the features that a sparsifier has besides, with the decoder held fixed; 0 where there are none."""
        rest, there_are = self.bias.detach() - y, False
        for part in parts:
            values = part.layer.sparsifier.gate_values(part.pre, part.active.feature)
            if values is not None:
                there_are = True
                written = decode_active(values, part.layer.decoder.detach(), part.active)
                rest = rest + nn.functional.pad(written, (rest.shape[1] - written.shape[1], 0))
        return rest.square().sum() if there_are else rest.new_zeros(())

    @torch.no_grad()
    def _observe(self, parts: list[_LayerPass], step: Step, processes: Processes) -> None:
        """Counts which features were on, over all processes, whose counts are the same afterwards."""
        counts_now = step.warmth >= 1
        for part in parts:
            layer, on = part.layer, part.active.feature[part.is_on]
            count = processes.sum(torch.bincount(on, minlength=self.config.width))
            layer.unseen += step.tokens
            layer.unseen[count > 0] = 0
            if counts_now and self._is_late:
                highest = torch.zeros_like(layer.largest).scatter_reduce_(0, on, part.values.detach()[part.is_on], "amax")
                layer.on_count += count
                torch.maximum(layer.largest, processes.largest(highest), out=layer.largest)
            l0 = float(count.sum()) / max(step.tokens, 1)
            layer.sparsifier.observe(part.values.detach()[part.is_on], l0, step)
        if counts_now and self._is_late:
            self.tokens_counted += step.tokens

    _is_late = False  # the last quarter of the run, of which densities and maxima are kept

    def start_step(self, number: int) -> None:
        """Says which step follows."""
        self._is_late = number >= 0.75 * self.optimisation.steps

    # ---- what is reported

    def density(self) -> Tensor:
        """[features] share of tokens, in the last quarter of the run, on which each was on."""
        return torch.cat([cast(Layer, layer).on_count for layer in self.layers]).double() / max(int(self.tokens_counted), 1)

    def dead_share(self) -> float:
        """Share of features that have not been on for `dead_after` tokens."""
        return float(torch.cat([layer.dead(self.optimisation.dead_after) for layer in self.layers]).float().mean())  # type: ignore[operator]


class _LayerPass:
    """A layer on one batch.

    Attributes:
        x: [tokens, d_in] what it reads. active: which features are computed.
        pre, values: [n_active] pre-activations and features. is_on: [n_active] features other than 0.
    """

    def __init__(self, learner: Learner, index: int, x: Tensor, step: Step) -> None:
        layer = learner.layers[index]
        assert isinstance(layer, Layer)
        self.layer = layer
        if len(learner.layers) > 1:
            starts = [0]
            for site in learner.reads:
                starts.append(starts[-1] + len(learner.calibration.mean[site]))
            x = x[:, starts[index] : starts[index + 1]]
        shift = learner.bias if learner.subtracts else None
        with torch.no_grad():
            self.x = x if shift is None else x - shift
            pre = nn.functional.linear(self.x, layer.encoder, layer.bias).float()  # [tokens, features]
            self.active = ActiveFeatures(layer.sparsifier.active(pre, step), *pre.shape)
        self.pre = encode_active(pre, self.x, layer.encoder, layer.bias, shift, self.active)
        self.values = layer.sparsifier.values(self.pre, self.active.feature)
        self.is_on = self.values.detach() > 0


# ---- errors


def _site_not_captured(site: Site, calibration: Calibration) -> ConfigError:
    return ConfigError(
        f"the activations of '{site}' are not captured",
        expected="a site of the activation data",
        found=", ".join(map(str, calibration.scale)),
        remedy="pass all sites of all dictionaries to ActivationData",
    )
