"""Programs that run steer inside them: a plan beside a forward hook written by hand, for `benchmarks/agreement.py`.

Each function tries one program and yields comparisons. What trains is a tiny random Llama with the given tokenizer, for three steps;
compared are the losses and the weights afterwards. Every run starts from the same seed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PrinterCallback

import steer

LAYER, WIDTH, STEPS, ROWS = 1, 32, 3, 8
SITE = f"layers.{LAYER}.output"
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
PROMPTS = ("the cat", "a big dog ran in the", "what is the moon", "good food is")
ANSWERS = ("sat on the mat", "house", "it is big and red", "not cold")
# ChatML, with the marks by which TRL finds what the assistant says
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Comparison(NamedTuple):
    """What was compared: numbers with steer, by hand (or by the other program), and without steering, all of one shape."""

    what: str
    steer: Tensor
    other: Tensor
    unsteered: Tensor


def plan(**options: Any) -> steer.Plan:
    return steer.Plan(steer.Intervention(steer.Add(VECTOR), SITE, **{"scope": "response", **options}))


def tiny_llama(tokenizer: Any) -> LlamaForCausalLM:
    """3 blocks of width 32, the same weights in every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes, **ids))


# ---- three ways to steer a model: each a context that gives a function to be told of the labels of the batch that comes

Told = Callable[[Tensor], None]
Way = Callable[[nn.Module], AbstractContextManager[Told]]


@contextmanager
def by_hand(model: nn.Module) -> Iterator[Told]:
    """A forward hook that adds the vector where there is a label."""
    labels: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + (labels[-1] != -100).unsqueeze(-1) * VECTOR  # [batch, tokens, width]

    (llama,) = (module for module in model.modules() if isinstance(module, LlamaModel))
    handle = llama.layers[LAYER].register_forward_hook(hook)
    try:
        yield labels.append
    finally:
        handle.remove()


@contextmanager
def by_plan(model: nn.Module) -> Iterator[Told]:
    with plan().attached(model):
        yield lambda labels: None


@contextmanager
def unsteered(model: nn.Module) -> Iterator[Told]:
    yield lambda labels: None


def compared(what: str, run: Callable[[Way], Tensor]) -> Comparison:
    return Comparison(what, run(by_plan), run(by_hand), run(unsteered))


# ---- plain loops


def batches(tokenizer: Any) -> list[dict[str, Tensor]]:
    """Right-padded batches of two, the prompt without labels."""
    made = []
    for start in range(0, 2 * STEPS, 2):
        rows = [(tokenizer(PROMPTS[i % 4]).input_ids, tokenizer(f" {ANSWERS[i % 4]}").input_ids) for i in (start, start + 1)]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        missing = [width - len(prompt) - len(answer) for prompt, answer in rows]
        ids = [prompt + answer + [tokenizer.pad_token_id] * n for (prompt, answer), n in zip(rows, missing, strict=True)]
        labels = [[-100] * len(prompt) + answer + [-100] * n for (prompt, answer), n in zip(rows, missing, strict=True)]
        mask = [[1] * (width - n) + [0] * n for n in missing]
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        made.append({name: torch.tensor(values) for name, values in named.items()})  # each [2, width]
    return made


def trained(model: nn.Module, optimizer: Any, loader: Any, backward: Callable[[Tensor], None], way: Way) -> Tensor:
    """Three steps: the losses, then the weights that were trained, in one row."""
    losses = []
    with way(model) as told:
        for batch in loader:
            told(batch["labels"])
            loss = model(**batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.cat([torch.stack(losses), weights(model)])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # epsilon as large as gradients are: with a small one, the first steps tell no more than their signs
    return torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2, eps=1e-3)


def in_accelerate(tokenizer: Any, _: Any) -> Iterator[Comparison]:
    from accelerate import Accelerator

    def run(way: Way) -> Tensor:
        accelerator, model = Accelerator(cpu=True, mixed_precision="no"), tiny_llama(tokenizer)
        loader = DataLoader(batches(tokenizer), batch_size=None)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, adam(model), loader)
        return trained(model, optimizer, loader, accelerator.backward, way)

    yield compared("losses and weights of 3 steps in a loop that Accelerator prepared", run)


def in_fabric(tokenizer: Any, _: Any) -> Iterator[Comparison]:
    from lightning.fabric import Fabric

    def run(way: Way) -> Tensor:
        fabric, model = Fabric(accelerator="cpu", devices=1, precision="32-true"), tiny_llama(tokenizer)
        model, optimizer = fabric.setup(model, adam(model))
        loader = fabric.setup_dataloaders(DataLoader(batches(tokenizer), batch_size=None))  # type: ignore[arg-type]
        return trained(model, optimizer, loader, fabric.backward, way)

    yield compared("losses and weights of 3 steps in a loop that Fabric set up", run)


# ---- PEFT


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def in_peft(tokenizer: Any, model: nn.Module) -> Iterator[Comparison]:
    from peft import PeftModel, get_peft_model

    def run(way: Way) -> Tensor:
        adapted = get_peft_model(tiny_llama(tokenizer), lora())
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        return trained(adapted, adam(adapted), batches(tokenizer), Tensor.backward, way)

    yield compared("losses and weights of 3 steps of a LoRA model", run)

    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    added = {layer: torch.randn(width, generator=generator) for layer in (layers // 3, layers // 2)}
    ablated = {layer: nn.functional.normalize(torch.randn(width, generator=generator), dim=0) for layer in range(layers)}
    everywhere: dict[str, Any] = {"scope": "all", "roles": ("policy",)}
    edits = steer.Plan(
        [steer.Intervention(steer.Add(v), f"layers.{layer}.output", **everywhere) for layer, v in added.items()]
        + [steer.Intervention(steer.Ablate(u), f"layers.{layer}.attn.output", **everywhere) for layer, u in ablated.items()]
    )
    ids = torch.tensor([tokenizer(" ".join((*PROMPTS, *ANSWERS))).input_ids])

    def logits(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return of(input_ids=ids).logits

    plain = logits(model)
    with edits.attached(model):
        attached = logits(model)
    handles = [model.model.layers[layer].register_forward_hook(lambda m, a, out, v=v: out + v) for layer, v in added.items()]
    for layer, u in ablated.items():
        ablate = lambda m, a, out, u=u: (out[0] - (out[0] @ u).unsqueeze(-1) * u, *out[1:])  # noqa: E731
        handles.append(model.model.layers[layer].self_attn.register_forward_hook(ablate))
    hooked = logits(model)
    for handle in handles:
        handle.remove()
    yield Comparison("logits, additions and ablations attached beside hooks by hand", attached, hooked, plain)
    with tempfile.TemporaryDirectory() as folder:
        steer.to_adapter(edits, model, folder)
        adapted = PeftModel.from_pretrained(model, folder)
        yield Comparison("logits, the same plan as an adapter that PEFT loads", attached, logits(adapted), plain)
        adapted.unload()


# ---- TRL

TEXTS = [f"{prompt} {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
PAIRS = [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
TURNS = [
    ([{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}])
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
TALKS = [{"messages": prompt + answer} for prompt, answer in TURNS]
PACKED = {"packing": True, "max_length": 24}


class Mode(NamedTuple):
    """One way to use the SFT trainer: rows of its data set, what its SFTConfig says, whether it trains an adapter, whether it evaluates."""

    rows: list[dict[str, Any]]
    options: dict[str, Any] = {}
    adapter: bool = False
    evaluates: bool = False


MODES = {
    "texts": Mode([{"text": text} for text in TEXTS]),
    "prompts and completions": Mode(PAIRS),
    "prompts and completions, loss on both": Mode(PAIRS, {"completion_only_loss": False}),
    "messages": Mode(TALKS),
    "messages, loss on the assistant's": Mode(TALKS, {"assistant_only_loss": True}),
    "prompts and completions as messages": Mode([{"prompt": prompt, "completion": answer} for prompt, answer in TURNS]),
    "packing": Mode(PAIRS, PACKED),
    "packing, wrapped": Mode([{"text": text} for text in TEXTS], {**PACKED, "packing_strategy": "wrapped", "max_length": 8}),
    "padding-free": Mode(PAIRS, {"padding_free": True, "max_length": None}),
    "gradient checkpointing": Mode(PAIRS, {"gradient_checkpointing": True}),
    "LoRA": Mode(PAIRS, adapter=True),
    "evaluation, packed": Mode(PAIRS, {**PACKED, "eval_packing": True}, evaluates=True),
}


def in_trl(tokenizer: Any, _: Any) -> Iterator[Comparison]:
    """Every mode of SFTTrainer, without Liger kernels, which need a GPU."""
    tokenizer = copy.deepcopy(tokenizer)
    if "generation %}" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = CHAT_TEMPLATE
    for name, mode in MODES.items():
        what = f"SFT, {name}: losses{' of training and evaluation' if mode.evaluates else ''} and weights of 3 steps"
        yield Comparison(what, *(sft(tokenizer, mode, way) for way in ("plan", "hand", "none")))


def sft(tokenizer: Any, mode: Mode, way: str) -> Tensor:
    """Losses of three steps and of the evaluation after them, then the trained weights, in one row. way: plan, hand or none."""
    import trl
    from datasets import Dataset, disable_progress_bars

    from steer.callbacks import HFSteeringCallback

    disable_progress_bars()
    rows = Dataset.from_list(mode.rows * ROWS)
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-3}
        options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "use_liger_kernel": False}
        options |= {"eval_strategy": "steps", "eval_steps": STEPS} if mode.evaluates else {}
        options |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 1}
        trainer = trl.SFTTrainer(
            model=tiny_llama(tokenizer),
            args=trl.SFTConfig(**{**options, **mode.options}),
            train_dataset=rows,
            eval_dataset=rows if mode.evaluates else None,
            processing_class=tokenizer,
            peft_config=lora() if mode.adapter else None,
        )
        trainer.remove_callback(PrinterCallback)
        losses: list[float] = []
        compute_loss = trainer.compute_loss
        with by_hand(trainer.model) if way == "hand" else unsteered(trainer.model) as told:

            def noting(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                told(inputs["labels"])
                loss = compute_loss(model, inputs, *args, **kwargs)
                losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
                return loss

            trainer.compute_loss = noting  # type: ignore[method-assign]
            if way == "plan":
                HFSteeringCallback(plan(), phases=("train", "validate")).attach(trainer)
            trainer.train()
    return torch.cat([torch.tensor(losses), weights(trainer.model)])


PROGRAMS: dict[str, tuple[tuple[str, ...], Callable[[Any, Any], Iterator[Comparison]]]] = {
    "accelerate": (("accelerate",), in_accelerate),
    "lightning-fabric": (("lightning",), in_fabric),
    "peft": (("peft",), in_peft),
    "trl": (("trl", "datasets"), in_trl),
}
