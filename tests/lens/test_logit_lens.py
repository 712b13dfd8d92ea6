"""The logit lens is the model itself behind the last block, on many families, and what it says in between is by hand."""

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS, VOCAB, WIDTH
from hand import hook_count, ids, recorded

import steer
from steer.errors import AnatomyError, ConfigError, SiteError
from steer.lens import LogitLens, Readout, lens_reading
from steer.model.tokens import Row

SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
BASE = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "cohere, scaled logits": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**BASE, num_key_value_heads=2, intermediate_size=64, logit_scale=0.0625)
    ),
    "granite, divided logits": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**BASE, num_key_value_heads=2, intermediate_size=64, logits_scaling=7.0, residual_multiplier=0.3)
    ),
    "gemma2, capped low": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**BASE, num_key_value_heads=2, head_dim=8, intermediate_size=64, final_logit_softcapping=0.5)
    ),
    "untied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**BASE, num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=False)
    ),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**BASE, num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, pad_token_id=0)
    ),
}


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_behind_the_last_block_it_says_what_the_model_says(family):
    model = seeded(FAMILIES.get(family) or OTHERS[family])
    lens = LogitLens.of(model)
    last = f"layers.{LAYERS - 1}.output"
    with torch.no_grad(), recorded(model, [last]) as seen:
        logits = model(ids()).logits
    with torch.no_grad():
        said = lens.logits(seen[last], last)
    assert float((said - logits).abs().max()) <= 1e-5 * max(1, float(logits.abs().max()))
    assert hook_count(model) == 0 and float(logits.std()) > 0


def test_in_between_it_is_norm_and_unembedding_of_the_stream(tiny):
    model = tiny("llama")
    reading = lens_reading(LogitLens.of(model), Row(tuple(ids(1, 6)[0].tolist()), 2), sites=["embed", "layers.*.output"], top=4)
    with torch.no_grad():
        output = model(ids(1, 6), output_hidden_states=True)
        by_hand = [model.lm_head(model.model.norm(h))[0] for h in output.hidden_states[:-1]] + [output.logits[0]]
    assert [str(site) for site in reading.sites] == ["embed", "layers.0.output", "layers.1.output", "layers.2.output"]
    final = output.logits[0].log_softmax(-1)
    for i, logits in enumerate(by_hand):
        probabilities = logits.softmax(-1)
        assert torch.equal(reading.top[i], logits.topk(4).indices)
        assert torch.allclose(reading.probabilities[i], probabilities.topk(4).values, atol=1e-6)
        assert torch.allclose(reading.entropy[i], torch.distributions.Categorical(probabilities).entropy(), atol=1e-4)
        assert torch.allclose(reading.kl[i], (final.exp() * (final - logits.log_softmax(-1))).sum(-1), atol=1e-4)
    assert float(reading.kl[-1].abs().max()) < 1e-5 < float(reading.kl[0].max())
    assert reading.ids.tolist() == ids(1, 6)[0].tolist() and repr(reading) == "Reading(logit lens, 4 sites, 6 tokens, top 4)"


def test_inputs_of_blocks_are_the_outputs_below(tiny):
    lens = LogitLens.of(tiny("llama"))
    assert [lens.readout.depth_of(site) for site in ("embed", "layers.0.input", "layers.0.output", "layers.-1.output")] == [0, 0, 1, LAYERS]


def test_a_plan_that_is_attached_is_read_too(tiny):
    model = tiny("llama")
    lens, row = LogitLens.of(model), Row(tuple(ids(1, 6)[0].tolist()), 2)
    before = lens_reading(lens, row)
    with steer.Plan(steer.Intervention(steer.Add(3 * torch.ones(WIDTH)), "layers.1.output")).attached(model):
        after = lens_reading(lens, row)
    assert torch.equal(before.kl[:2], lens_reading(lens, row).kl[:2]) and not torch.equal(before.probabilities[-1], after.probabilities[-1])
    assert torch.equal(before.probabilities[1], after.probabilities[1])


def test_a_tokens_direction_is_its_row_of_the_unembedding(tiny, tmp_path):
    model = tiny("llama")
    found = LogitLens.of(model).directions([7, 9], ["layers.1.output", "embed"], name="of", against=[11])
    rows = model.lm_head.weight.detach()
    assert torch.allclose(found["layers.1.output"].vector, (rows[7] + rows[9]) / 2 - rows[11], atol=1e-6)
    assert found["embed"].method == "logit_lens" and found.provenance["tokens"] == [7, 9]
    assert steer.Directions.load(found.save(tmp_path / "of"))["embed"].held_out == "nothing"


class Shifted(transformers.LlamaForCausalLM):
    """Logits are moved after the unembedding, which no scale or cap explains."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(VOCAB) / 50
        return output


def test_other_readouts_are_refused(tiny):
    config = transformers.LlamaConfig(**BASE, num_key_value_heads=2, intermediate_size=64)
    with pytest.raises(AnatomyError, match="are not its unembedding of its normed residual stream(.|\n)*differ from it by"):
        Readout.of(seeded(lambda: Shifted(config)))
    opt = transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    with pytest.raises(AnatomyError, match="are not its unembedding"):
        Readout.of(seeded(lambda: transformers.OPTForCausalLM(opt)))
    with pytest.raises(AnatomyError, match="no unembedding"):
        Readout.of(tiny("llama").model)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda lens, row: lens_reading(lens, row, sites=["layers.1.mlp.output"]), SiteError, "cannot read 'layers.1.mlp.output'"),
        (lambda lens, row: lens_reading(lens, row, top=VOCAB + 1), ConfigError, "more tokens than there are"),
        (lambda lens, row: lens_reading(lens, row, top=0), ConfigError, "number of tokens"),
        (lambda lens, row: lens_reading("logit", row), ConfigError, "the lens of a reading"),
        (lambda lens, row: lens_reading(lens, "text"), ConfigError, "the text of a reading"),
        (lambda lens, row: lens.directions([], ["embed"], name="x"), ConfigError, "a direction of no tokens"),
        (lambda lens, row: lens.directions([VOCAB], ["embed"], name="x"), ConfigError, "no such token"),
    ],
)
def test_bad_input_is_refused(wrong, error, match, tiny):
    with pytest.raises(error, match=match):
        wrong(LogitLens.of(tiny("llama")), Row((3, 4, 5), 1))


def test_a_plot_says_every_token(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    from tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    reading = lens_reading(LogitLens.of(tiny("llama")), Row(tuple(tokenizer("the cat sat on a mat").input_ids), 1), top=2)
    for colour in ("probability", "entropy", "kl"):
        reading.plot(tokenizer, tmp_path / f"{colour}.svg", colour=colour)
    text = (tmp_path / "kl.svg").read_text()
    assert all(word in text for word in ("the", "cat", "layers.1.output", reading.words(tokenizer)[1][2][0]))
    with pytest.raises(ConfigError, match="unknown colour"):
        reading.plot(tokenizer, colour="rank")
