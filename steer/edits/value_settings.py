"""Settings of the value problem, and what it gives: the shift that an MLP has to write for a fact."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steer.checks import finite_number, number_within, one_of, whole_number

CLAMPS = ("mlp_output", "block_output")


@dataclass(frozen=True)
class ValueSettings:
    """How values are optimised.

    The loss of a fact is the mean over contexts of -log p(target) per token, plus `kl` times KL(p before || p with delta) behind
    "<subject> is a", plus `weight_decay` |delta| / |v|^2, where v is what `clamp_of` names, in the prompt itself. Equation 4 of ROME
    and its code have the two sides of the KL the other way round; for small shifts both are the same.

    Attributes:
        lr: of Adam. steps: most evaluations of the loss; there is one update less.
        clamp: |delta| is at most this times |v|.
        clamp_of: `block_output` (the residual stream behind the block: MEMIT's) or `mlp_output` (ROME's, with a clamp of 4). Where a norm
            follows the MLP (Gemma), the first is taken in the units of what the down projection gives.
        stop_loss: a fact is done when its loss is below, in nat.
        stop_at_argmax: a fact is done when every token of the target was the most probable one in all contexts for this many evaluations
            (MPES of ENCORE, arXiv 2502.01636, has 2). None for never: with 2 it takes half of the evaluations, and the value is weaker,
            which paraphrases show first (docs/results/editing.md).
        argmax_weight: while that is so, its log-probability counts this much (PMET, arXiv 2308.08742, section 4.2, has 0.1).
        stop_kl: and it is done when the KL is at most this, in nat. None for never.
        with_attention: a second delta of what the attention of the block gives is optimised beside, and left out of the edit (PMET).

    Example:
        >>> quick = ValueSettings(steps=5, lr=1.0)
        >>> (value,) = solve_values(model, tokenizer, [fact], contexts, 8, quick)
    """

    lr: float = 0.5
    steps: int = 20
    clamp: float = 0.75
    clamp_of: str = "block_output"
    kl: float = 0.0625
    weight_decay: float = 0.5
    stop_loss: float = 0.05
    stop_at_argmax: int | None = None
    argmax_weight: float = 1.0
    stop_kl: float | None = None
    with_attention: bool = False

    def __post_init__(self) -> None:
        finite_number(self.lr, "the learning rate of values", above=0)
        whole_number(self.steps, "the steps of values", least=1)
        finite_number(self.clamp, "the clamp of values", above=0)
        one_of(self.clamp_of, CLAMPS, "what the clamp of values refers to")
        for name in ("kl", "weight_decay", "stop_loss", "argmax_weight"):
            number_within(getattr(self, name), f"{name} of values", 0)
        if self.stop_at_argmax is not None:
            whole_number(self.stop_at_argmax, "stop_at_argmax of values", least=1)
        if self.stop_kl is not None:
            number_within(self.stop_kl, "stop_kl of values", 0)


@dataclass(frozen=True, eq=False)
class Value:
    """What is to be written for one fact at one layer.

    Attributes:
        delta: [width] fp32 on the CPU, added to the output of the down projection (before a norm that follows it). All zeros where the
            model gives the target already.
        written: [width] fp32 on the CPU, what the down projection gives there before, in the prompt itself (where that has no weight beside
            contexts, the mean over these).
        mlp_norm, block_norm: of what the down projection and the block give there, the second in the units of the first.
        loss: the lowest one, which `delta` has. probability: of the target per token with it, mean over contexts.
        steps: evaluations of the loss.
        stopped: `loss`, `argmax`, `kl`, `steps`, or `no_op` where the model gives the target already.
        seconds: of CPU time that it took; of those that are found together an equal share each.

    Example:
        >>> (value,) = solve_values(model, tokenizer, [fact], contexts, layer=8)
        >>> value.delta.shape, value.stopped  # [width]
    """

    delta: Tensor
    written: Tensor
    mlp_norm: float
    block_norm: float
    loss: float
    probability: float
    steps: int
    stopped: str
    seconds: float = 0.0

    @property
    def is_no_op(self) -> bool:
        """There is nothing to write."""
        return self.stopped == "no_op"
