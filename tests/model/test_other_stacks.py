"""Encoders, decoders and vision towers by name: each block is steered as by a hook written by hand, with the tokens of its own stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hand import Means, edited, ids, vector
from own_models import own_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    SiglipConfig,
    SiglipModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import steer
from steer.errors import ConfigError, ContextError, DeployError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.intervene.gates.cosine import CosineGate
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.hook_registration import OwnHook
from steer.model.site import Site
from steer.model.tokens import Row

LAYERS = 2
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}  # 16 patches
SEQ2SEQ = {
    **{"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    },
}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32, "suppress_tokens": None, "begin_suppress_tokens": None}

MODELS: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**SEQ2SEQ, **AUDIO)),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VISION)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config={**TEXT, "max_position_embeddings": 64}, vision_config=VISION, projection_dim=16)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config={**TEXT, "max_position_embeddings": 64}, vision_config=VISION)),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=95, image_seq_length=16)
    ),
    "smolvlm": lambda: SmolVLMForConditionalGeneration(
        SmolVLMConfig(vision_config=VISION, text_config={**TEXT, "model_type": "llama"}, image_token_id=95, scale_factor=2)
    ),
}
# model, stack as a prefix, its list of blocks, its number of tokens
STACKS = [
    ("t5", "encoder.", "encoder.block", 6),
    ("t5", "decoder.", "decoder.block", 5),
    ("t5", "", "decoder.block", 5),
    ("bart", "encoder.", "model.encoder.layers", 6),
    ("bart", "", "model.decoder.layers", 5),
    ("whisper", "encoder.", "model.encoder.layers", 12),
    ("whisper", "", "model.decoder.layers", 5),
    ("bert", "", "bert.encoder.layer", 6),
    ("modernbert", "", "model.layers", 6),
    ("vit", "", "vit.layers", 17),
    ("clip", "vision.", "vision_model.encoder.layers", 17),
    ("clip", "text.", "text_model.encoder.layers", 6),
    ("clip", "", "text_model.encoder.layers", 6),
    ("siglip", "vision.", "vision_model.encoder.layers", 16),
    ("siglip", "", "text_model.encoder.layers", 6),
    ("llava", "vision.", "model.vision_tower.encoder.layers", 17),
    ("llava", "", "model.language_model.layers", 20),
    ("smolvlm", "vision.", "model.vision_model.encoder.layers", 16),
    ("smolvlm", "", "model.text_model.layers", 8),
]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # what starts at zero would hide a change
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def batch_of(name: str) -> dict[str, Tensor]:
    """Two rows; the second one's text has padding on the right, that of a decoder has none."""
    torch.manual_seed(1)
    words = {"input_ids": ids(2, 6).clamp_max(90), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": ids(2, 5, seed=3)}
    if name in ("t5", "bart"):
        return {**words, "decoder_input_ids": ids(2, 5, seed=3)}
    if name == "vit":
        return pixels
    if name in ("clip", "siglip"):
        return {**words, **pixels}
    if name in ("llava", "smolvlm"):
        n_images = 16 if name == "llava" else 4
        text = torch.cat([torch.full((2, n_images), 95), ids(2, 4)], 1)
        mask = torch.ones_like(text)
        return {
            "input_ids": text,
            "attention_mask": mask,
            "pixel_values": pixels["pixel_values"][:, None] if name == "smolvlm" else pixels["pixel_values"],
        }
    return words


def real_tokens(name: str, prefix: str, tokens: int, batch: dict[str, Tensor]) -> Tensor:
    """[2, tokens] bool: those of the stack that are no padding."""
    own_mask = prefix == "encoder." and name != "whisper" or name in ("bert", "modernbert", "clip", "siglip") and prefix != "vision."
    return batch["attention_mask"].bool() if own_mask else torch.ones(2, tokens, dtype=torch.bool)


def chosen(scope: str, real: Tensor) -> Tensor:
    if scope == "all":
        return real
    if scope == "last":
        return nn.functional.one_hot(real.sum(1) - 1, real.shape[1]).bool()
    index = torch.arange(real.shape[1])
    return real & (index >= 1) & (index < 3)  # positions[1:3]


def flat(output: Any) -> list[Tensor]:
    """Every number of an output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in flat(value)]


@contextmanager
def pushed(block: nn.Module, push: Tensor) -> Iterator[None]:
    """Adds to what a block gives, before the hooks by which transformers records hidden states."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

    handle = block.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def own_hooks(model: nn.Module) -> int:
    """Those of transformers stay."""
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    return sum(isinstance(hook, OwnHook) for hook in hooks)


def run(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return flat(model(**batch))


@pytest.mark.parametrize(("name", "prefix", "blocks", "tokens"), STACKS)
def test_steering_a_block_equals_a_hook_written_by_hand(name, prefix, blocks, tokens):
    model, batch = build(name), batch_of(name)
    real = real_tokens(name, prefix, tokens, batch)
    plain = run(model, batch)
    for layer in range(LAYERS):
        site = f"{prefix}layers.{layer}.output"
        for scope in ("all", "last", "positions[1:3]"):
            tokens_meant = chosen(scope, real)
            push = tokens_meant.unsqueeze(-1) * vector()
            with pushed(model.get_submodule(f"{blocks}.{layer}"), push):
                expected = run(model, batch)
            with Plan(Intervention(Add(vector()), site, scope)).attached(model) as attachment:
                steered = run(model, batch)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(steered, expected, strict=True))
            if scope == "all" and layer == 0:  # heads may read one token alone, or the last block but one
                assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(steered, plain, strict=True))
            assert attachment.fired() == {f"add@{site}": int(tokens_meant.sum())}
        with Plan(Intervention(Add(vector()), site, strength=0.0)).attached(model):
            assert all(torch.equal(a, b) for a, b in zip(run(model, batch), plain, strict=True))
    assert own_hooks(model) == 0


@pytest.mark.parametrize(("name", "prefix"), [("t5", "encoder."), ("clip", "vision."), ("whisper", "encoder."), ("vit", ""), ("bert", "")])
def test_a_vector_is_learned_in_a_stack(name, prefix):
    model, batch = build(name), batch_of(name)
    plan = Plan(Intervention(Add(torch.zeros(32)).train(), f"{prefix}layers.0.output"))
    (learned,) = plan.parameters()
    optimizer = torch.optim.Adam([learned], 0.1)
    losses = []
    with plan.attached(model):
        for _ in range(5):
            loss = next(tensor for tensor in flat(model(**batch)) if tensor.requires_grad).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] and float(learned.detach().norm()) > 0


def test_a_plan_on_several_stacks_counts_the_tokens_of_each_and_keeps_rows_apart():
    model, batch = build("t5"), batch_of("t5")
    slots = Add(torch.stack([vector(), torch.zeros(32)]))
    plan = Plan(
        [
            Intervention(slots, "encoder.layers.0.output", name="read"),
            Intervention(Add(vector()), "decoder.layers.1.output", "last", name="write"),
        ]
    )
    with plan.attached(model) as attachment:
        attachment.set_rows([1, 0])
        steered = run(model, batch)
        assert attachment.passes == 1
    assert attachment.fired() == {"read": 10, "write": 2} and own_hooks(model) == 0
    row = torch.tensor([0.0, 1.0]).view(2, 1, 1) * batch["attention_mask"].unsqueeze(-1) * vector()
    last = nn.functional.one_hot(torch.tensor(4), 5).view(1, 5, 1) * vector()
    with edited(model.encoder.block[0], lambda h: h + row), edited(model.decoder.block[1], lambda h: h + last):
        expected = run(model, batch)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(steered, expected, strict=True))


def test_an_encoder_reads_its_prompt_once_in_a_generation_and_the_decoder_goes_on():
    model, batch = build("t5"), batch_of("t5")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plan = Plan([Intervention(Add(vector()), f"{prefix}layers.0.output", name=prefix or "text") for prefix in ("encoder.", "")])
    with plan.attached(model) as attachment:
        model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert attachment.fired() == {"encoder.": 10, "text": 8}


def test_prompt_and_response_of_an_encoder_have_to_be_told():
    model, batch = build("t5"), batch_of("t5")
    labels = ids(2, 5, seed=4)
    plan = Plan(Intervention(Add(vector()), "encoder.layers.0.output", "response"))
    with plan.attached(model), pytest.raises(ContextError, match="cannot tell prompt from response"):
        model(**batch, labels=labels)  # those of the decoder
    mask = torch.arange(6).expand(2, 6) >= 3
    with plan.attached(model) as attachment, steer.response_tokens(model.encoder, mask):
        model(**batch, labels=labels)
    assert attachment.fired() == {"add@encoder.layers.0.output": 4}


def test_names_of_stacks():
    anatomy = Anatomy.find(build("clip"))
    assert [str(site) for site in anatomy.sites("vision.layers.*.mlp.output")] == [f"vision.layers.{n}.mlp.output" for n in range(LAYERS)]
    assert anatomy.of_stack("vision_model").path == "vision_model.encoder" and anatomy.of_stack("text") is anatomy
    assert str(anatomy.point("vision.layers.-1.output").site) == "vision.layers.1.output"
    with pytest.raises(SiteError, match="did you mean 'vision'"):
        anatomy.point("vison.layers.0.output")
    with pytest.raises(SiteError, match="did you mean 'vision.layers.0.output'"):
        Site.parse("vision.layers.0.outptu")
    for text in ("encoder.layers.3.output", "decoder.embed", "action.head.layers.0.mlp.input"):
        assert str(Site.parse(text)) == text and Site.parse(text).stack == text.partition(".layers")[0].removesuffix(".embed")


def test_an_action_head_beside_a_language_model():
    class Robot(nn.Module):
        def __init__(self):
            super().__init__()
            self.language, self.action = build("bert"), own_model("policy")

        def forward(self, frames, **text):
            return self.action(frames + self.language(**text).logits[:, :1, :7])

    robot, frames, text = Robot(), torch.randn(2, 7, 7), batch_of("bert")
    with torch.no_grad():
        with edited(robot.action.trunk[1], lambda h: h + vector()):
            expected = robot(frames, **text)
        with Plan(Intervention(Add(vector()), "action.layers.1.output")).attached(robot) as attachment:
            assert torch.allclose(robot(frames, **text), expected, atol=1e-5)
    assert attachment.fired() == {"add@action.layers.1.output": 14}


def test_a_gate_reads_the_stack_that_is_steered():
    gate = CosineGate(vector(), threshold=0.0, site="encoder.layers.0.output")
    with pytest.raises(ConfigError, match="reads another stack"):
        Plan(Intervention(Add(vector()), "decoder.layers.1.output", gate=gate)).attach(build("t5"))


def test_files_and_text_keep_the_stack(tmp_path):
    model = build("t5")
    plan = Plan(Intervention(Add(vector()), "encoder.layers.1.output"), fingerprint=Anatomy.find(model).fingerprint())
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.interventions[0].site == Site("output", 1, stack="encoder") and "encoder.layers.1.output" in loaded.explain()
    loaded.attach(model).detach()


def test_weights_of_other_stacks_are_not_edited(tmp_path):
    plan = Plan(Intervention(Add(vector()), "encoder.layers.0.output"))
    with pytest.raises(DeployError, match=r"encoder.layers.0.output"):
        steer.bake(plan, build("t5"))
    with pytest.raises(DeployError, match=r"encoder.layers.0.output"):
        steer.to_adapter(plan, build("t5"), tmp_path / "adapter")


@pytest.mark.parametrize(("name", "site"), [("t5", "encoder.layers.1.output"), ("bert", "layers.1.output")])
def test_texts_are_read_by_an_encoder(name, site):
    model, means = build(name), Means()
    rows = [Row(tuple(range(3, 3 + length)), 1) for length in (4, 6)]
    capture(model, rows, {Site.parse(site): means}, span="all")
    point = Anatomy.find(model).point(site)
    seen: list[Tensor] = []
    handle = point.module.register_forward_hook(lambda *a: seen.append((a[-1][0] if isinstance(a[-1], tuple) else a[-1]).detach()))
    for i, row in enumerate(rows):
        point.anatomy.decoder(input_ids=torch.tensor([row.ids]))
        assert torch.allclose(means.values[i], seen[-1][0].mean(0), atol=1e-4)
    handle.remove()


def test_texts_do_not_run_through_a_vision_tower():
    with pytest.raises(ConfigError, match="texts cannot be run through"):
        capture(build("clip"), [Row((3, 4), 1)], {Site.parse("vision.layers.0.output"): Means()})
