"""LM Evaluation Harness: its model type `steered` with a steering file, and log-likelihoods as its tasks ask for them."""

from __future__ import annotations

from contextlib import contextmanager

from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel

DISTRIBUTIONS = ("lm-eval",)


class Arm:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @contextmanager
    def applied(self, setting):
        # all texts in one batch, which pads
        self.evaluated = SteeredModel(
            pretrained=self.model, steer_path=setting["file"], device="cpu", tokenizer=self.tokenizer, batch_size=8
        )
        yield

    def loglikelihoods(self, texts):
        requests = [Instance("loglikelihood", {}, tuple(text), number) for number, text in enumerate(texts)]
        return [logprob for logprob, _ in self.evaluated.loglikelihood(requests, disable_tqdm=True)]
