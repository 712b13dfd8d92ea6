"""Deployment: a plan in the weights, in an adapter, or in the files of other programs, where they can carry it exactly."""

from steer.intervene.deploy.adapter import to_adapter
from steer.intervene.deploy.bake import Baked, bake
from steer.intervene.deploy.control_vector import to_gguf
from steer.intervene.deploy.handover import Handover
from steer.intervene.deploy.lm_eval import to_lm_eval

__all__ = ["Baked", "Handover", "bake", "to_adapter", "to_gguf", "to_lm_eval"]
