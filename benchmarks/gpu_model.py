"""What interventions and monitors cost a decoder: prefill, decoding with and without a CUDA graph, a training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from gpu_clock import Sizes, milliseconds
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from steer.directions import Direction
from steer.drift.tracker import DriftTracker
from steer.intervene import Add, Intervention, Plan
from steer.intervene.deploy.bake import bake
from steer.kernels import edit
from steer.model.site import Site

Arm = Callable[[], AbstractContextManager[Any]]


def random_decoder(sizes: Sizes) -> LlamaForCausalLM:
    """Llama of the given shape, weights in bf16, made on the device."""
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=max(sizes.heads // 4, 1),
        max_position_embeddings=8192,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if sizes.on_gpu else torch.float32)
    try:
        with torch.device(sizes.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def arms(model: LlamaForCausalLM, sizes: Sizes) -> dict[str, Arm]:
    """Bare twice, which shows the noise, and what is attached at every layer; the features at one."""
    layers = range(sizes.layers)
    vectors = [0.1 * sizes.random(sizes.width, seed=seed).cpu() for seed in range(3)]

    def plan(*edits: tuple[Tensor, dict[str, Any]], rows: int = 0) -> Arm:
        """Adds of vectors with options at every layer; rows: so many rows, each with a slot of its own."""
        interventions = [
            Intervention(Add(vector), f"layers.{layer}.output", name=f"{layer}.{i}", **options)
            for layer in layers
            for i, (vector, options) in enumerate(edits)
        ]

        @contextmanager
        def attached() -> Iterator[None]:
            with Plan(interventions).attached(model) as attachment:
                if rows:
                    attachment.set_rows(range(rows))
                yield

        return attached

    @contextmanager
    def clamped() -> Iterator[None]:
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        read, write = (0.05 * sizes.random(16, sizes.width, seed=seed).to(device, dtype) for seed in (4, 5))
        handle = model.model.layers[sizes.layers // 2].register_forward_hook(
            lambda module, args, output: edit(output, read, write, threshold=0.1, scale=0.0, shift=0.3)
        )
        try:
            yield
        finally:
            handle.remove()

    named = {
        f"v{i}": [Direction(Site.parse(f"layers.{n}.output"), vectors[i % 3] + i, "none", "response") for n in layers] for i in range(6)
    }
    row_vectors = 0.1 * sizes.random(sizes.rows, sizes.width, seed=6).cpu()
    return {
        "bare": nullcontext,
        "bare again": nullcontext,
        "add, baked into biases": lambda: bake(
            Plan([Intervention(Add(vectors[0]), f"layers.{n}.output") for n in layers]), model, savable=False
        ),
        "add": plan((vectors[0], {})),
        "add, norm kept": plan((vectors[0], {"preserve_norm": True})),
        "3 vectors": plan(*((v, {}) for v in vectors)),
        "a vector for each row": plan((row_vectors, {}), rows=sizes.rows),
        "16 features of one layer": clamped,
        "drift, 8 directions": lambda: DriftTracker(named, controls=2, stream=True).attached(model),
    }


def decoder_costs(sizes: Sizes) -> list[dict[str, Any]]:
    """Time of each work with each arm, and its ratio to the bare decoder of the same round, median over rounds."""
    model = random_decoder(sizes)
    every = arms(model, sizes)
    ids = torch.randint(0, sizes.vocabulary, sizes.prompt, device=sizes.device)
    batch = torch.randint(0, sizes.vocabulary, sizes.batch, device=sizes.device)
    token = ids[:, :1]
    rows = token.expand(sizes.rows, 1).contiguous()
    cache = DynamicCache()

    @torch.no_grad()
    def prefill() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def decode() -> None:
        model(token, past_key_values=cache, use_cache=True)

    def train() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    with torch.no_grad():
        model(ids[:, : sizes.prompt[1] // 4], past_key_values=cache, use_cache=True)
    steered = ("add", "add, norm kept", "3 vectors", "16 features of one layer")
    works: dict[str, tuple[Callable[[], Callable[[], Any]], tuple[str, ...]]] = {
        "prefill": (lambda: prefill, steered),
        "decode": (lambda: decode, steered),
        "decode, CUDA graph": (lambda: captured(model, token, sizes), ("add, baked into biases", *steered)),
        "decode 256 rows, CUDA graph": (lambda: captured(model, rows, sizes), ("add", "a vector for each row")),
        "training step": (lambda: train, ("add", "add, norm kept", "drift, 8 directions")),
    }
    costs = []
    for work, (prepare, wanted) in works.items():
        model.train(work == "training step")
        costs += measured(work, prepare, {name: every[name] for name in ("bare", "bare again", *wanted)}, sizes)
    return costs


def captured(model: LlamaForCausalLM, ids: Tensor, sizes: Sizes) -> Callable[[], Any]:
    """A pass over one token a row as a CUDA graph, hooks and all. Without a cache: reading the weights is what a decoded token costs."""

    @torch.no_grad()
    def run() -> None:
        model(ids, use_cache=False)

    if not sizes.on_gpu:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measured(work: str, prepare: Callable[[], Callable[[], Any]], chosen: dict[str, Arm], sizes: Sizes) -> list[dict[str, Any]]:
    """Measures the arms in turns and reverses the order every other round. Reports an arm that fails and leaves it out from then on."""
    times: dict[str, list[float]] = {name: [] for name in chosen}
    failed: dict[str, str] = {}
    for number in range(sizes.rounds):
        for name in list(chosen)[:: 1 if number % 2 else -1]:
            if name in failed:
                continue
            try:
                with chosen[name]():
                    times[name].append(milliseconds(prepare(), sizes, warm=2))
            except Exception as error:  # one arm must not cost the others their numbers
                if name == "bare":
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    rows = []
    for name in chosen:
        row: dict[str, Any] = {"work": work, "arm": name}
        if name in failed:
            rows.append({**row, "failed": failed[name]})
        else:
            ratios = [a / b for a, b in zip(times[name], times["bare"], strict=True)]
            rows.append(
                {**row, "ms": statistics.median(times[name]), "ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}
            )
    return rows
