"""How a module of one's own is called is proven, not guessed: its batch, its token ids, its masks, its caches, and which stack is meant."""

from __future__ import annotations

import pytest
import torch
from hand import Means, edited, vector
from own_models import VOCAB, WIDTH, PreNormBlock, TinyGPT, call_of, logits_of, mlp, own_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

import steer
from steer.errors import AnatomyError, ContextError, SiteError
from steer.intervene import Add, Intervention, Plan
from steer.model.anatomy import Anatomy
from steer.model.capture import capture
from steer.model.site import Site
from steer.model.tokens import Row

WORDS = call_of("gpt")[0][0]  # [2, 7]
WORD = int(WORDS[0, 3])
LAST = torch.arange(7).expand(2, 7) == 6


def agrees(model: nn.Module, args: tuple, block: nn.Module, scope: str, tokens: Tensor, site: str = "layers.0.output") -> bool:
    """The plan does what a hook written by hand does. tokens: [...] the tokens of the scope, in the layout of the block."""
    with torch.no_grad():
        with edited(block, lambda h: h + tokens.unsqueeze(-1) * vector()):
            expected = logits_of(model(*args))
        with Plan(Intervention(Add(vector()), site, scope)).attached(model) as attachment:
            steered = logits_of(model(*args))
    assert sum(attachment.fired().values()) == int(tokens.sum())
    return torch.allclose(steered, expected, atol=1e-5)


# ---- the batch


class TokensFirst(nn.Module):
    """torch's own encoder in its default layout, [tokens, batch, width] inside."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, norm_first=True)
        self.tok, self.enc, self.head = nn.Embedding(VOCAB, WIDTH), nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 5)

    def forward(self, words: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        return self.head(self.enc(self.tok(words).transpose(0, 1), src_key_padding_mask=pad_mask).transpose(0, 1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_stream_that_begins_with_tokens_is_steered():
    model = TokensFirst()
    padding = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [5]])
    last = F.one_hot((~padding).sum(1) - 1, 7).bool()
    blocks = model.enc.layers
    assert agrees(model, (WORDS, padding), blocks[0], "last", last.T)
    assert agrees(model, (WORDS, padding), blocks[1], "all", ~padding.T, site="layers.1.output")
    assert agrees(
        model, (WORDS[:, :2],), blocks[0], f"tokens[{int(WORDS[0, 1])}]", (WORDS[:, :2] == WORDS[0, 1]).T
    )  # as many rows as tokens
    assert agrees(model, (WORDS,), blocks[0].self_attn.out_proj, "last", LAST.T, site="layers.0.attn.output") is False  # it is not called
    assert agrees(model, (WORDS,), blocks[0].dropout1, "last", LAST.T, site="layers.0.attn.output")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_a_batch_of_another_kind_holds_is_changed_too():
    class OfBatches(TokensFirst):
        def forward(self, batch):  # type: ignore[override]
            return super().forward(batch["words"])

    model = OfBatches()
    steer.describe(model, "enc.layers", example=({"words": torch.zeros(2, 4, dtype=torch.long)},))
    square = WORDS[:, :2]
    assert agrees(model, ({"words": square},), model.enc.layers[0], "last", torch.tensor([[False, False], [True, True]]))


def test_rows_that_change_each_other_are_refused():
    class Coupled(TinyGPT):
        def forward(self, idx):  # type: ignore[override]
            x = self.transformer["wte"](idx)
            x = x - x.mean((0, 1))
            for block in self.transformer["h"]:
                x = block(x)
            return x

    with pytest.raises(SiteError, match="rows change each other"):
        Anatomy.find(Coupled()).point("layers.0.output")

    class Ignorant(TinyGPT):
        def forward(self, idx):  # type: ignore[override]
            return super().forward(torch.arange(15).view(3, 5))

    with pytest.raises(SiteError, match="no argument .* was seen to change it"):
        Anatomy.find(Ignorant()).point("layers.0.output")


# ---- token ids


@pytest.mark.parametrize("example", [torch.zeros(2, 8, dtype=torch.long), torch.randint(0, VOCAB, (4, 3))])
def test_an_example_of_any_size_shows_the_token_ids(example):
    model = own_model("gpt")
    steer.describe(model, "transformer.h", example=example)
    assert agrees(model, (WORDS,), model.transformer["h"][0], f"tokens[{WORD}]", WORDS == WORD)


def test_segments_are_not_taken_for_words():
    class WithSegments(TinyGPT):
        def __init__(self, n_segments):
            super().__init__()
            self.transformer = nn.ModuleDict({"seg": nn.Embedding(n_segments, WIDTH), **self.transformer})

        def forward(self, segments, idx):  # type: ignore[override]
            parts = self.transformer
            x = parts["wte"](idx) + parts["seg"](segments)
            for block in parts["h"]:
                x = block(x)
            return x

    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 2)
    example = {"segments": torch.zeros(2, 6, dtype=torch.long), "idx": torch.randint(0, VOCAB, (2, 6))}
    for n_segments, embed in ((2, None), (VOCAB, "transformer.wte")):
        model = WithSegments(n_segments)
        steer.describe(model, "transformer.h", embed=embed, example=example)
        assert agrees(model, (segments, WORDS), model.transformer["h"][0], f"tokens[{WORD}]", WORDS == WORD)
    model = WithSegments(VOCAB)  # two tables alike: nothing says which one is that of the words
    steer.describe(model, "transformer.h", example=example)
    with (
        pytest.raises(ContextError, match="needs token ids"),
        Plan(Intervention(Add(vector()), "layers.0.output", "tokens[1]")).attached(model),
    ):
        model(segments, WORDS)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.module(*inputs, **named)


@pytest.mark.parametrize("wrap", [Wrapper, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapper_whose_arguments_have_no_names(wrap):
    model = own_model("gpt")
    wrapped = wrap(model)
    block = model.transformer["h"][0]
    assert agrees(wrapped, (WORDS,), block, f"tokens[{WORD}]", WORDS == WORD)
    means = {Site.parse("layers.0.output"): Means()}
    capture(wrapped, [Row(tuple(WORDS[0].tolist()), 2), Row(tuple(WORDS[1, :4].tolist()), 2)], means, span="all")
    kept: list[Tensor] = []
    hook = block.register_forward_hook(lambda _, __, output: kept.append(output[0].mean(0)))
    model(WORDS[:1]), model(WORDS[1:, :4])
    hook.remove()
    (values,) = (one.values for one in means.values())
    assert torch.allclose(values[0], kept[0], atol=1e-5) and torch.allclose(values[1], kept[1], atol=1e-5)


def test_arguments_by_name_alone():
    class Named(TinyGPT):
        def forward(self, *, idx):  # type: ignore[override]
            return super().forward(idx)

    model = Named()
    with Plan(Intervention(Add(vector()), "layers.0.output", f"tokens[{WORD}]")).attached(model) as attachment:
        model(idx=WORDS)
    assert sum(attachment.fired().values()) == int((WORDS == WORD).sum())


def test_a_stream_with_more_tokens_than_the_words_is_counted_by_itself():
    class Led(TinyGPT):
        def forward(self, idx):  # type: ignore[override]
            x = self.transformer["wte"](idx)
            x = torch.cat([x[:, :1] * 0 + 1, x], 1)
            for block in self.transformer["h"]:
                x = block(x)
            return x

    model = Led()
    assert agrees(model, (WORDS,), model.transformer["h"][0], "last", torch.arange(8).expand(2, 8) == 7)
    assert agrees(model, (WORDS[:, :1],), model.transformer["h"][0], "last", torch.tensor([[False, True]] * 2))


# ---- masks


def test_a_square_mask_of_rows_is_not_taken_for_one_of_places():
    class Weighted(TinyGPT):
        def forward(self, idx, loss_mask=None):  # type: ignore[override]
            logits = super().forward(idx)[0]
            return logits if loss_mask is None else logits * loss_mask.unsqueeze(-1)

    real = torch.ones(2, 2)
    real[1, 1] = 0
    model = Weighted()
    with Plan(Intervention(Add(vector()), "layers.0.output")).attached(model):
        model(WORDS[:, :2], torch.ones(2, 2).tril())  # as causal as it may be, it says the same of all tokens
        real[0, 1], real[1] = 1, torch.tensor([1, 0])
        with pytest.raises(ContextError, match="'loss_mask' of this Weighted"):
            model(WORDS[:, :2], real)


@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 7), (2, 1, 1, 7)])
def test_a_mask_that_is_spread_over_heads_is_proven_like_any_other(shape):
    class Masked(TinyGPT):
        def __init__(self):
            super().__init__()
            self.attend = nn.ModuleList([nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(2)])
            self.blocks = nn.ModuleList([MaskedBlock() for _ in range(2)])

        def forward(self, idx, keep):  # type: ignore[override]
            x = self.transformer["wte"](idx)
            for block in self.blocks:
                x = block(x, keep.reshape(len(idx), -1))
            return x

    class MaskedBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.think = nn.MultiheadAttention(WIDTH, 4, batch_first=True), mlp()

        def forward(self, x, keep):
            x = x + self.attend(x, x, x, key_padding_mask=~keep, need_weights=False)[0]
            return x + self.think(x)

    model = Masked()
    real = torch.arange(7).expand(2, 7) < torch.tensor([[7], [5]])
    block = model.blocks[0]
    steer.describe(
        model, "blocks", attn="attend", mlp="think", example=(torch.randint(0, VOCAB, (2, 6)), torch.ones(*shape[:-1], 6).bool())
    )
    assert agrees(model, (WORDS, real.reshape(shape)), block, "last", F.one_hot(real.sum(1) - 1, 7).bool())
    assert Anatomy.find(model).point("layers.0.attn.output").module is block.attend


def test_a_mask_that_is_spread_over_heads_and_was_not_proven_is_refused():
    class Loose(TinyGPT):
        def forward(self, idx, mask=None):  # type: ignore[override]
            return super().forward(idx)

    model, mask = Loose(), torch.ones(2, 1, 1, 7)
    with Plan(Intervention(Add(vector()), "layers.0.output")).attached(model):
        model(WORDS, mask)
        mask[1, ..., 5:] = 0
        with pytest.raises(ContextError, match="'mask' of this Loose"):
            model(WORDS, mask)


# ---- which stack


class Translator(nn.Module):
    """Encoder and decoder of torch, with the same words or with two tables of them."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, WIDTH)
        self.tok_out = self.tok if shared else nn.Embedding(VOCAB, WIDTH)
        self.net = nn.Transformer(WIDTH, 4, 2, 2, 64, 0.0, batch_first=True)

    def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor | None = None, tgt_mask: Tensor | None = None) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.net(
            self.tok(src), self.tok_out(tgt), tgt_mask=causal, src_key_padding_mask=src_mask, tgt_key_padding_mask=tgt_mask,
            memory_key_padding_mask=src_mask,
        )  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_the_words_of_a_decoder_are_not_those_of_its_encoder(shared):
    model = Translator(shared)
    ids, no_padding = torch.randint(0, VOCAB, (2, 6)), torch.zeros(2, 6, dtype=torch.bool)
    steer.describe(model, "net.decoder.layers", example=(ids, ids[:, :4], no_padding, no_padding[:, :4]))
    padding = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [4]])
    padding_out = torch.arange(7).expand(2, 7) >= torch.tensor([[5], [7]])
    args = (WORDS.flip(0), WORDS, padding, padding_out)
    first, last = model.net.decoder.layers
    assert agrees(model, args, first, f"tokens[{WORD}]", (WORDS == WORD) & ~padding_out)
    assert agrees(model, args, last, "last", F.one_hot((~padding_out).sum(1) - 1, 7).bool(), site="layers.1.output")
    encoded = model.net.encoder.layers[0]
    assert agrees(model, args, encoded, "last", F.one_hot((~padding).sum(1) - 1, 7).bool(), site="encoder.layers.0.output")


def test_the_half_of_a_model_that_happens_to_run_alone_is_not_taken_for_all_of_it():
    with pytest.raises(AnatomyError, match="several decoders") as caught:
        Anatomy.find(Translator(True))
    assert "net.encoder.layers" in str(caught.value) and "net.decoder.layers" in str(caught.value)

    class Captioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = ViTModel(ViTConfig(image_size=16, patch_size=4, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4))
            self.tok, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.ModuleList([PreNormBlock() for _ in range(2)])

        def forward(self, pixels, words):
            x = torch.cat([self.vit(pixels).last_hidden_state, self.tok(words)], 1)
            for block in self.blocks:
                x = block(x)
            return x

    model = Captioner().eval()
    with pytest.raises(AnatomyError, match="several decoders"):
        Anatomy.find(model)
    steer.describe(model, "blocks", example=(torch.randn(2, 3, 16, 16), WORDS))
    args = (torch.randn(2, 3, 16, 16), WORDS)
    assert agrees(model, args, model.blocks[0], "last", torch.arange(24).expand(2, 24) == 23)


def test_lists_in_one_module_share_its_calls():
    class InOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok, self.tok_out = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
            self.encoder = nn.ModuleList([PreNormBlock() for _ in range(2)])
            self.decoder = nn.ModuleList([PreNormBlock() for _ in range(2)])

        def forward(self, src, tgt):
            memory, x = self.tok(src), self.tok_out(tgt)
            for block in self.encoder:
                memory = block(memory)
            x = x + memory.mean(1, keepdim=True)
            for block in self.decoder:
                x = block(x)
            return x

    model = InOne()
    steer.describe(model, "decoder", example=(torch.randint(0, VOCAB, (2, 5)), torch.randint(0, VOCAB, (2, 5))))
    for n_words in (7, 4):
        words = WORDS[:, :n_words]
        assert agrees(model, (WORDS.flip(0), words), model.decoder[0], f"tokens[{WORD}]", words == WORD)
    with pytest.raises(SiteError, match="another stack lies in the same module"):
        Anatomy.find(model).point("encoder.layers.0.output")


def test_a_head_of_blocks_is_not_taken_for_what_is_before_it():
    class Headed(TinyGPT):
        def __init__(self):
            super().__init__()
            self.project = nn.Sequential(PreNormBlock(), PreNormBlock())

        def forward(self, idx):  # type: ignore[override]
            x = self.transformer["wte"](idx)
            for block in self.transformer["h"]:
                x = block(x)
            return self.project(x)

    model = Headed()
    assert agrees(model, (WORDS,), model.transformer["h"][0], "last", LAST)


def test_blocks_with_an_embedding_a_norm_and_a_head_in_one_sequential():
    model = nn.Sequential(
        nn.Embedding(VOCAB, WIDTH), PreNormBlock(), nn.Dropout(), PreNormBlock(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
    )
    model.eval()
    anatomy = Anatomy.find(model)
    assert anatomy.blocks == [model[1], model[3]] and anatomy.final_norm is model[4] and anatomy.unembedding is model[5]
    assert agrees(model, (WORDS,), model[3], f"tokens[{WORD}]", WORDS == WORD, site="layers.1.output")


# ---- parts of blocks


class Inline(nn.Module):
    """Everything in one forward, with no module for attention or MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = (nn.Linear(WIDTH, n) for n in (3 * WIDTH, WIDTH, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).split(WIDTH, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Scan(nn.Module):
    """A running mean through one linear map, as a state space."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.silu(self.inp(x)).cumsum(1))


def test_parts_that_are_no_modules_are_known_by_what_they_do():
    model = own_model("gpt")
    model.transformer["h"] = nn.ModuleList([Inline(), Scan()])
    steer.describe(model, "transformer.h", attn="out", mlp="down")  # block 1 has no 'down', and its 'out' mixes, too
    anatomy = Anatomy.find(model)
    assert [writer.mixes for writer in anatomy.parts[0].writers] == [True, False]
    assert [writer.mixes for writer in anatomy.parts[1].writers] == [True]
    for path, site in (("h.0.out", "layers.0.attn.output"), ("h.0.down", "layers.0.mlp.output"), ("h.1.out", "layers.1.mixer.output")):
        assert agrees(model, (WORDS,), model.transformer.get_submodule(path), "last", LAST, site=site)


# ---- caches, and torch's own encoder


class Cached(nn.Module):
    """Its cache is a list of tensors, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.ModuleList([Scan() for _ in range(2)])

    def forward(self, idx: Tensor, kv_cache: list[Tensor] | None = None, use_cache: bool = False) -> tuple[Tensor, list[Tensor]]:
        x = self.tok(idx) + (0 if kv_cache is None else kv_cache[0])
        states = [x[:, -1:]]
        for block in self.blocks:
            x = block(x)
        return x, states


@pytest.mark.parametrize(
    ("scope", "fired"), [("all", [14, 16, 18]), ("last", [2, 4, 6]), ("generated", [0, 2, 4]), ("prompt", [14, 14, 14])]
)
def test_a_cache_that_does_not_say_what_it_holds(scope, fired):
    model, counts, cache, words = Cached(), [], None, WORDS
    with Plan(Intervention(Add(vector()), "layers.0.output", scope)).attached(model) as attachment:
        for _ in range(3):
            _, cache = model(words, kv_cache=cache, use_cache=True)
            counts.append(sum(attachment.fired().values()))
            words = WORDS[:, :1]
    assert counts == fired


@pytest.mark.parametrize("scope", ["positions[0]", "generated[:2]", "prompt"])
def test_positions_after_such_a_cache_are_refused(scope):
    model = Cached()
    with Plan(Intervention(Add(vector()), "layers.0.output", scope)).attached(model):
        _, cache = model(WORDS, use_cache=True)
        with pytest.raises(ContextError, match="positions cannot be told|given and decoded tokens|did not see the prompt|prompt"):
            for words in (WORDS[:, :1], WORDS[:, :2]):
                model(words, kv_cache=cache, use_cache=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")
def test_texts_that_torch_packs_without_their_padding_are_refused():
    class Encoder(TokensFirst):
        def __init__(self):
            super().__init__()
            self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True), 2)

        def forward(self, words, pad_mask=None):
            return self.head(self.enc(self.tok(words), src_key_padding_mask=pad_mask))

    model = Encoder().eval()
    padding = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [5]])
    with Plan(Intervention(Add(vector()), "layers.0.output")).attached(model) as attachment:
        model(WORDS, padding)  # with gradients nothing is packed
        assert sum(attachment.fired().values()) == 12
        with torch.no_grad(), pytest.raises(SiteError, match="nested tensor"):
            model(WORDS, padding)
    means = {Site.parse("layers.0.output"): Means()}
    capture(model, [Row(tuple(words.tolist()), 2) for words in (WORDS[0], WORDS[1, :5])], means, span="all")  # which reads them as they are
    assert means[Site.parse("layers.0.output")].values[1].isfinite().all()
    assert torch.backends.mha.get_fastpath_enabled()
    model.enc.use_nested_tensor = False
    assert agrees(model, (WORDS, padding), model.enc.layers[0], "last", F.one_hot((~padding).sum(1) - 1, 7).bool())


def test_buffers_that_a_forward_writes_to_are_put_back():
    class Counting(TinyGPT):
        def __init__(self):
            super().__init__()
            self.register_buffer("n_calls", torch.zeros(()))
            self.register_buffer("latest", torch.zeros(3))

        def forward(self, idx):  # type: ignore[override]
            self.n_calls += 1
            self.latest = torch.ones(3)
            return super().forward(idx)

    model = Counting()
    latest = model.latest
    Anatomy.find(model)
    assert model.n_calls == 0 and model.latest is latest and not latest.any()
