"""Trains a BatchTopK dictionary with sae-lens on the batches of a file: `python saelens_train.py ACTIVATIONS STEPS FEATURES K LR OUT`.

sae-lens's own defaults but for width, k, learning rate and its schedule; activations are scaled beforehand (`normalize_activations=none`),
as the other side scales them. Prints one JSON object, and saves the finished dictionary in sae-lens's format.
"""

import json
import sys
import time

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

activations, steps, features, k, lr, out = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
tensors = load_file(activations)
h, order = tensors["train"], tensors["order"]  # [tokens, width], [steps, batch]
n_steps, batch = int(steps), order.shape[1]


def batches():  # noqa: ANN201
    while True:  # the trainer asks for one more than it uses
        for number in range(n_steps):
            yield h[order[number]].float()


sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=h.shape[1], d_sae=int(features), k=float(k), normalize_activations="none"))
config = SAETrainerConfig(
    total_training_samples=n_steps * batch, train_batch_size_samples=batch, lr=float(lr), lr_end=float(lr) / 100, lr_warm_up_steps=50,
    lr_decay_steps=n_steps // 5, dead_feature_window=max(1, 150_000 // batch), logger=LoggingConfig(log_to_wandb=False),
)  # fmt: skip
trainer = SAETrainer(config, sae, batches())
began = time.process_time()
trainer.fit()
seconds = time.process_time() - began
sae.save_inference_model(out)
print(json.dumps({"seconds": seconds, "tokens": n_steps * batch}))
