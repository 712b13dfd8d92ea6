"""repsteer: `learners.DiffMean` at one site a fit, and a plan of `operators.Add`."""

from __future__ import annotations

import repsteer as rs
import torch

DISTRIBUTIONS = ("repsteer",)


class Arm:
    def __init__(self, model, tokenizer):
        self.wrapped = rs.models.from_model(model, tokenizer=tokenizer, model_id="embedded", revision="1")

    def extract(self, pairs, layers, batch):
        data = rs.data.ContrastivePairs.from_records([{"positive": positive, "negative": negative} for positive, negative in pairs])
        directions = {}
        for layer in layers:  # a learner reads one site, so every layer takes passes of its own
            learner = rs.learners.DiffMean(
                site=rs.sites.resid_post(layer), positions=rs.positions.LastNonPaddingToken(), normalize=None, batch_size=batch
            )
            directions[layer] = learner.fit(self.wrapped, data).direction
        return directions

    def steered(self, vectors):
        return self.wrapped.steer(rs.SteeringPlan([self.addition(layer, v) for layer, v in vectors.items()]))

    def addition(self, layer, v):
        site = rs.sites.resid_post(layer)
        metadata = rs.artifacts.ArtifactMetadata(model_id="embedded", model_revision="1", site=site, hidden_size=len(v))
        return rs.Intervention(
            artifact=rs.artifacts.DirectionArtifact(metadata=metadata, direction=v),
            operator=rs.operators.Add(),
            positions=rs.positions.AllTokens(),
            strength=rs.schedules.Constant(1.0),
        )

    def forward(self, ids):
        return self.wrapped.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).logits

    def generate(self, ids, new):
        generated = self.wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return generated.token_ids
