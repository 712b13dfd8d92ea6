"""Site: every address can be written and read back; anything else is refused with the grammar."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SiteError
from steer.model.site import LAYER_PARTS, MODEL_PARTS, Site, expand

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,6}(\.[a-z0-9_]{1,6}){0,4}", fullmatch=True)
SITES = st.one_of(
    st.builds(Site, st.sampled_from(sorted(LAYER_PARTS)), layer=st.integers(-99, 999)),
    st.builds(Site, st.sampled_from(sorted(MODEL_PARTS))),
    st.builds(Site, st.sampled_from(["input", "output"]), module=NAMES),
)


@given(SITES)
def test_what_is_printed_is_read_back(site):
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site


@given(st.text(max_size=30))
def test_any_text_is_a_site_or_a_typed_error(text):
    try:
        assert str(Site.parse(text)) in (text, text.replace("-0", "0")) or Site.parse(text).layer is not None
    except SiteError as error:
        assert "layers.<n>.<part>" in str(error)


@pytest.mark.parametrize("text", ["layers.3", "layers.3.out", "layers.x.output", "layer.3.output", "12", "", "module:a", "module::output"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(SiteError, match="unknown site"):
        Site.parse(text)


def test_the_nearest_address_is_offered():
    with pytest.raises(SiteError, match="did you mean 'layers.3.mlp.output'"):
        Site.parse("layers.3.mlp.out")
    with pytest.raises(SiteError, match="did you mean 'final_norm'"):
        Site.parse("finalnorm")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("layer.3.output", "layers.3.output"),
        ("layers.3.attention.output", "layers.3.attn.output"),
        ("layers.3.mlp.out", "layers.3.mlp.output"),
        ("block.3", "layers.3.output"),
        ("layers.3", "layers.3.output"),
        ("layers[3].output", "layers.3.output"),
        ("model.layers.-1", "layers.-1.output"),
        ("layers.3.attn", "layers.3.attn.output"),
        ("model.layers.3.self_attn.q_proj", "layers.3.attn.q"),
        ("model.layers.3.self_attn.o_proj", "layers.3.attn.output"),
        ("transformer.h.3.mlp", "layers.3.mlp.output"),
        ("blocks.3.hook_resid_pre", "layers.3.input"),
        ("blocks.3.hook_resid_post", "layers.3.output"),
        ("blocks.3.hook_attn_out", "layers.3.attn.output"),
        ("blocks.3.attn.hook_z", "layers.3.attn.z"),
        ("hidden_states[3]", "layers.3.input"),
        ("layers.3.feed_forward.input", "layers.3.mlp.input"),
        ("layers.3.mlp.neuron", "layers.3.mlp.neurons"),
        ("Layers.3.Output", "layers.3.output"),
        ("layer-3.output", "layers.3.output"),
        ("layer.*.output", "layers.*.output"),
        ("layer.4-9.attention", "layers.4-9.attn.output"),
        ("embedding", "embed"),
        ("model.embed_tokens", "embed"),
        ("lm_head", "logits"),
        ("model.norm", "final_norm"),
        ("module:encoder.2", "module:encoder.2:output"),
    ],
)
def test_what_other_programs_call_a_site_is_understood(text, meant):
    with pytest.raises(SiteError, match=re.escape(f"did you mean '{meant}'?")):
        Site.parse(text)


@pytest.mark.parametrize("text", ["", "nothing", "layers.3.x", "gpt4.turbo", "layers.x.output", "module:", "module::output"])
def test_no_site_is_made_up_for_what_is_like_none(text):
    with pytest.raises(SiteError) as caught:
        Site.parse(text)
    assert caught.value.remedy == "write it in one of these forms, e.g. 'layers.0.output'"


def test_a_bare_layer_number_is_refused_with_the_remedy():
    with pytest.raises(SiteError, match="layers.12.output"):
        Site.parse(12)


def test_patterns_expand_in_order():
    assert [str(s) for s in expand("layers.*.attn.z", 3)] == ["layers.0.attn.z", "layers.1.attn.z", "layers.2.attn.z"]
    assert [str(s) for s in expand("layers.1-2.output", 3)] == ["layers.1.output", "layers.2.output"]
    assert expand("final_norm", 3) == [Site("final_norm")]


@pytest.mark.parametrize("pattern", ["layers.1-3.output", "layers.2-1.output", "layers.9-9.output"])
def test_a_range_outside_the_model_is_refused(pattern):
    with pytest.raises(SiteError, match="0 to 2"):
        expand(pattern, 3)
