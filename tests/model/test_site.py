"""Site: every address can be written and read back; anything else is refused with the grammar."""

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
