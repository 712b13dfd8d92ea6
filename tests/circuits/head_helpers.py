"""A model of two blocks with planted heads: 0.1 looks at the token before, 1.0 is an induction head, 1.1 looks at equal tokens."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

POSITIONS, VOCAB = 16, 24
WIDTH = POSITIONS + 2 * VOCAB  # places for positions, tokens, and the tokens before
SIZE = WIDTH // 2  # of a head
TOKEN, BEFORE = slice(POSITIONS, POSITIONS + VOCAB), slice(POSITIONS + VOCAB, WIDTH)
SHARP = 12.0


def planted_model(implementation: str = "sdpa") -> GPT2LMHeadModel:
    """Positions and tokens are unit vectors of their own; MLPs are random and small."""
    sizes = {
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(**sizes, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False, attn_implementation=implementation)
        ).eval()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()[:, TOKEN] = torch.eye(VOCAB)
        model.transformer.wpe.weight.zero_()[:, :POSITIONS] = torch.eye(POSITIONS)
        first, second = (block.attn for block in model.transformer.h)
        for attention in (first, second):
            attention.c_attn.weight.mul_(0.01)
            attention.c_proj.weight.mul_(0.01)
        # Conv1D keeps [in, out]; q of head h are the columns from h * SIZE, k and v lie WIDTH and 2 * WIDTH behind
        _plant(first, 1, torch.eye(WIDTH)[:POSITIONS].roll(-1, 0), torch.eye(WIDTH)[:POSITIONS])
        first.c_attn.weight[TOKEN, 2 * WIDTH + SIZE :][:, :VOCAB] = torch.eye(VOCAB)
        first.c_proj.weight[SIZE : SIZE + VOCAB, BEFORE] = torch.eye(VOCAB)
        _plant(second, 0, torch.eye(WIDTH)[TOKEN], torch.eye(WIDTH)[BEFORE])
        second.c_attn.weight[TOKEN, 2 * WIDTH : 2 * WIDTH + VOCAB] = torch.eye(VOCAB)
        second.c_proj.weight[:VOCAB, TOKEN] = 4 * torch.eye(VOCAB)
        _plant(second, 1, torch.eye(WIDTH)[TOKEN], torch.eye(WIDTH)[TOKEN])
        model.lm_head.weight.zero_()[:, TOKEN] = torch.eye(VOCAB)
    return model


def _plant(attention: torch.nn.Module, head: int, asks: torch.Tensor, answers: torch.Tensor) -> None:
    """A head whose queries read the rows `asks` of the stream, [codes, width], and whose keys read `answers`, in that order."""
    codes = len(asks)
    start = head * SIZE
    attention.c_attn.weight[:, start : start + SIZE] = 0
    attention.c_attn.weight[:, WIDTH + start : WIDTH + start + SIZE] = 0
    attention.c_attn.weight[:, start : start + codes] = SHARP**0.5 * asks.T
    attention.c_attn.weight[:, WIDTH + start : WIDTH + start + codes] = SHARP**0.5 * answers.T
