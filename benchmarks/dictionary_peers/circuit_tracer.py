"""circuit-tracer: per-layer transcoders with ReLU, JumpReLU and skip connections, and cross-layer transcoders."""

import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # which has a module of this name
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from circuit_tracer.transcoder.activation_functions import JumpReLU  # noqa: E402
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet, load_relu_transcoder  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent))
from answers import FEATURES, WIDTH, Answers, randomised  # noqa: E402

LAYERS = 3
folder = Path(sys.argv[1])
answers = Answers(folder, "circuit-tracer")
config = "model_name: meta-llama/Llama-3.2-1B\nscan: x\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\nmodel_kind: "
cpu = torch.device("cpu")


def activation(kind: str, *shape: int) -> object:
    return JumpReLU(torch.zeros(*shape), 0.1) if kind == "jumprelu" else F.relu


for kind in ("relu", "jumprelu", "skip"):
    parts = {
        layer: SingleLayerTranscoder(
            WIDTH, FEATURES, activation(kind, FEATURES), layer, skip_connection=kind == "skip", device=cpu, dtype=torch.float32
        )
        for layer in range(LAYERS)
    }
    whole = TranscoderSet(parts, "mlp.hook_in", "hook_mlp_out")
    randomised(whole)
    whole.to_safetensors(str(folder / kind))
    (folder / kind / "config.yaml").write_text(config + "transcoder_set\n")
    whole_file = {"lazy_encoder": False, "lazy_decoder": False}
    one = load_relu_transcoder(str(folder / kind / "layer_2.safetensors"), 2, device=cpu, dtype=torch.float64, **whole_file)
    h = answers.activations()
    f = one.encode(h)
    answers.add(kind, kind, h, f, one.decode(f, h), layer=2)

for kind in ("relu", "jumprelu"):
    name = f"cross_layer_{kind}"
    clt = CrossLayerTranscoder(
        LAYERS, FEATURES, WIDTH, "jump_relu" if kind == "jumprelu" else "relu", lazy_decoder=False, device=cpu, dtype=torch.float32
    )
    randomised(clt)
    clt.to_safetensors(str(folder / name))
    (folder / name / "config.yaml").write_text(config + "cross_layer_transcoder\n")
    clt = load_clt(str(folder / name), device=cpu, dtype=torch.float64, lazy_decoder=False)
    h = answers.activations(LAYERS)
    f = clt.encode(h.transpose(0, 1))  # [layers, tokens, features]
    out = clt.decode(f.to_sparse())
    answers.add(name, name, h, f.transpose(0, 1).flatten(1), out.transpose(0, 1))
