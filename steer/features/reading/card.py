"""FeatureCard: what is known of one feature, in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A piece of text in which a feature is on.

    Attributes:
        tokens: as text, around the token where the feature is largest within its row. values: activations of the feature at each of them.
        peak: place of that token.
        is_top: among the largest of all texts; the others are spread over the range of values that the feature has.

    Example:
        >>> steer.features.reading.Example(("a", " cat", " sat"), (0.0, 2.5, 0.1), peak=1, is_top=True).text()
        'a<< cat>> sat'
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    is_top: bool

    @property
    def maximum(self) -> float:
        """The activation at the peak."""
        return self.values[self.peak]

    def text(self) -> str:
        """The piece with the peak between double angle brackets."""
        before, at, after = (self.tokens[: self.peak], self.tokens[self.peak], self.tokens[self.peak + 1 :])
        return f"{''.join(before)}<<{at}>>{''.join(after)}"


@dataclass(frozen=True)
class FeatureCard:
    """One feature.

    Attributes:
        density: share of tokens on which it is on. mean, maximum: of its activations where it is on.
        histogram: (edges, counts) of the activations where it is on.
        examples: the largest first, then those from the rest of its range.
        promoted, suppressed: (token, logit) of its logit weights; empty where it does not write the residual stream.
        nearest: (feature, cosine) of the decoder rows that are most alike.
        name: that an explainer gave; None without.

    Example:
        >>> card = steer.read_features(model, dictionary, texts, tokenizer=tokenizer, features=[3], context=16)[3]
        >>> card.maximum, card.promoted[:3]  # largest value; (token, logit)
    """

    feature: int
    density: float
    mean: float
    maximum: float
    histogram: tuple[tuple[float, ...], tuple[int, ...]]
    examples: tuple[Example, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    nearest: tuple[tuple[int, float], ...]
    name: str | None = None

    def __str__(self) -> str:
        title = f"feature {self.feature}" + (f": {self.name}" if self.name else "")
        lines = [title, f"on at {self.density:.3%} of tokens, mean {self.mean:.3g}, largest {self.maximum:.3g}"]
        for word, tokens in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            if tokens:
                lines.append(f"{word}: {', '.join(repr(token) for token, _ in tokens)}")
        if self.nearest:
            lines.append(f"nearest: {', '.join(f'{feature} ({cosine:.2f})' for feature, cosine in self.nearest)}")
        return "\n".join([*lines, *(f"  {example.maximum:8.3g}  {example.text()!r}" for example in self.examples)])
