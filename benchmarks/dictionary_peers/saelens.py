"""SAELens: every architecture that its registry can save, but matching pursuit and temporal ones."""

import sys
from pathlib import Path

import torch
from answers import FEATURES, WIDTH, Answers, randomised
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEMetadata

folder = Path(sys.argv[1])
answers = Answers(folder, "sae-lens")
hooks = {"hook_name": "blocks.3.hook_resid_post"}
hooks_of_transcoders = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
variants = {
    "layer_norm": ("topk", {"normalize_activations": "layer_norm"}),
    "constant_norm_rescale": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "no_subtraction": ("jumprelu", {"apply_b_dec_to_input": False}),
    "rescale_acts_by_decoder_norm": ("topk", {"rescale_acts_by_decoder_norm": True}),
}
kinds = {name: (name, {}) for name in SAE_CLASS_REGISTRY if name not in ("matching_pursuit", "temporal")} | variants
for name, (architecture, options) in kinds.items():
    cls, config_class = SAE_CLASS_REGISTRY[architecture]
    options = {"d_in": WIDTH, "d_sae": FEATURES, **options}
    if "topk" in architecture:
        options["k"] = 9
    if "transcoder" in architecture:
        options |= {"d_out": WIDTH, "apply_b_dec_to_input": False}
    config = config_class(**options)
    config.metadata = SAEMetadata(**(hooks_of_transcoders if "transcoder" in architecture else hooks))
    sae = cls(config)
    randomised(sae)
    sae.save_model(folder / name)
    sae = SAE.load_from_disk(folder / name, dtype="float64")
    h = answers.activations()
    f = sae.encode(h)
    out = sae.decode(f) + (h @ sae.W_skip.T if "skip" in architecture else 0)
    answers.add(name, name, h, f, out)

for name in ("batchtopk", "matryoshka_batchtopk"):
    cls, config_class = SAE_TRAINING_CLASS_REGISTRY[name]
    options = {"matryoshka_widths": [32, FEATURES]} if "matryoshka" in name else {}
    config = config_class(d_in=WIDTH, d_sae=FEATURES, k=9, **options)
    config.metadata = SAEMetadata(**hooks)
    training = cls(config)
    randomised(training)
    training.topk_threshold = torch.tensor(2.5, dtype=torch.float64)
    training.save_inference_model(folder / name)
    sae = SAE.load_from_disk(folder / name, dtype="float64")
    h = answers.activations()
    f = sae.encode(h)
    answers.add(name, name, h, f, sae.decode(f))

# a scale of the activations that is folded in after training: here by the caller, there by SAELens
cls, config_class = SAE_CLASS_REGISTRY["jumprelu"]
config = config_class(d_in=WIDTH, d_sae=FEATURES, normalize_activations="expected_average_only_in")
config.metadata = SAEMetadata(**hooks)
sae = cls(config)
randomised(sae)
sae.save_model(folder / "scaled")
sae = SAE.load_from_disk(folder / "scaled", dtype="float64")
sae.fold_activation_norm_scaling_factor(0.3)
h = answers.activations()
f = sae.encode(h)
answers.add("scaled", "scaled", h, f, sae.decode(f), norm_factor=0.3)
