"""Backward rules: what stands for the derivative of norms, attention and products when gradients go back for an attribution.

A new one is a file in `steer.circuits.backward_rules`. No value of the pass changes under any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar

from steer.model.anatomy import Anatomy
from steer.registry import Registry


class BackwardRule(ABC):
    """A rule that is entered around the forward pass whose gradients are wanted.

    Attributes:
        constant_denominators: those of norms are constants, also where gradients are brought back from readers to the stream.
    """

    name: ClassVar[str]
    constant_denominators: ClassVar[bool] = False

    @abstractmethod
    def applied(self, anatomy: Anatomy) -> AbstractContextManager[None]:
        """Passes of this model within are recorded so that gradients follow the rule.

        Everything is put back on every way out. Raises AnatomyError where the rule could not be proven on this model, from the pass.
        """


BACKWARD_RULES: Registry[type[BackwardRule]] = Registry(
    "backward rule", "steer.circuits.backward_rules", "steer.backward_rules", subclass_of=BackwardRule
)
