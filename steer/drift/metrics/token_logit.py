"""Change of a token's logit, of directions that a lens made."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.drift.measurement import SiteMeasurement
from steer.drift.metric import drift_metric
from steer.lens.lens import LENSES, direction_method


@drift_metric("token_logit", unit="logits", needs=("change",), controls=False)
def token_logit(site: SiteMeasurement) -> Tensor:
    """`change` times the length of a lens's direction: how much the lens's logit of its token rose, before the final norm."""
    change = site.named(site.values["change"])
    of_lens = {direction_method(name) for name in LENSES}
    is_token = torch.tensor([method in of_lens for method in site.directions.methods] or [False] * len(change))
    return torch.where(is_token, change * change.new_tensor(site.directions.gaps), torch.nan)
