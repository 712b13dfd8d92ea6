"""The page of a causal trace: self-contained, averages, a heat map of each fact with its cells under the pointer, what was left out."""

import re

import pytest
from edits.tracing_helpers import facts_of, traced
from report.page_reader import Page

from steer.errors import ConfigError
from steer.report import trace_figure, write_trace
from steer.report.numbers import number


@pytest.fixture(scope="module")
def result():
    from families import FAMILIES

    model = FAMILIES["llama"]()
    facts = facts_of(model)
    return traced(model, [*facts, facts[0].with_target("cat" if facts[0].target != "cat" else "dog")])


def test_the_page_shows_averages_facts_and_what_was_left_out(result, tmp_path):
    html = write_trace(tmp_path / "deep" / "trace.html", result).read_text()
    page = Page(html)
    assert not page.unbalanced and "https:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html) and "<script" not in html
    assert "prefers-color-scheme: dark" in html and "var(--arm-0)" in html and "var(--arm-1)" in html
    assert "2301.04213" in page.text["averages"] and "Choose the layers of an edit by a sweep" in page.text["averages"]
    layer, mean = result.average_effects("mlp").peak("last token")
    assert page.row("last token")[3] == f"{number(mean.value)} [{number(mean.low)}, {number(mean.high)}] in layer {layer}"
    said = "\n".join(page.said)
    trace = result[1]
    token, layer = divmod(int(trace.effects[0, 1].abs().argmax()), 3)
    assert f"'{trace.tokens[token]}', layer {layer}: {number(float(trace.effects[0, 1, token, layer]), signed=True)}" in said
    assert all(trace.fact.prompt in page.text["facts"] for trace in result)
    assert "the model says" in page.text["left-out"] and result.left_out[0].fact.target in page.row(result.left_out[0].fact.prompt)


def test_as_many_facts_are_drawn_as_are_asked_for(result, tmp_path):
    page = Page(write_trace(tmp_path / "trace.html", result, most=1, measure="logit difference").read_text())
    assert "1 more facts are in the averages, and not drawn." in page.text["facts"] and "(logit difference)" in page.text["facts"]


def test_figures_for_a_notebook(result, tmp_path):
    titles = [ax.get_title(loc="left") for ax in trace_figure(result, 0).axes]
    assert titles == ["one hidden state", "outputs of MLPs", "outputs of attention"]
    figure = trace_figure(result, measure="logit difference", width=3.0)
    figure.savefig(tmp_path / "averages.png")
    assert figure.axes[0].get_ylabel() == "indirect effect, logit difference" and (tmp_path / "averages.png").stat().st_size > 1000


def test_bad_input(result, tmp_path):
    with pytest.raises(ConfigError, match="the trace of a page"):
        write_trace(tmp_path / "page.html", {"facts": []})
    with pytest.raises(ConfigError, match="the measure of a trace"):
        write_trace(tmp_path / "page.html", result, measure="odds")
