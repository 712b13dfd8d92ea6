"""What a causal trace says: averages with intervals, which facts are left out, corruptions, seeds, files, bad input."""

import hashlib
import json

import pytest
import torch
from edits.tracing_helpers import TOKENIZER, apart, facts_of, known, traced
from scipy import stats

from steer.edits import Fact, TraceResult, causal_trace
from steer.edits.tracing import CORRUPTIONS, ROLES
from steer.edits.tracing.averages import role_of
from steer.edits.tracing.corruption import corruption_of
from steer.edits.tracing.corruptions.noise import Noise
from steer.edits.tracing.corruptions.replacement import Replacement
from steer.edits.tracing.passes import Passes
from steer.edits.tracing.prompts import Subjects, traced_prompts
from steer.errors import ConfigError, DamagedFileError, EditError, SteerError, SubjectNotFoundError, WrongKindError
from steer.files import save_artifact
from steer.model.anatomy import Anatomy

MORE = [("the big song in night is", "song"), ("where is the red tree in a", "red tree"), ("my cold water ran on", "cold water")]


@pytest.fixture(scope="module")
def model():
    from families import FAMILIES

    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def facts(model):
    return [*facts_of(model), *(known(model, *prompt) for prompt in MORE)]


@pytest.fixture(scope="module")
def result(model, facts):
    return traced(model, facts)


def subjects_of(model, facts):
    anatomy = Anatomy.find(model)
    return Subjects(model, anatomy, TOKENIZER, traced_prompts(TOKENIZER, facts, anatomy))


# ---- effects and averages


def test_readings_are_the_probability_of_the_answer_and_its_logit_above_the_next_token(model, facts, result):
    with torch.no_grad():
        logits = model(torch.tensor([TOKENIZER(facts[0].prompt).input_ids])).logits[0, -1].double()
    best, second = logits.topk(2).indices.tolist()
    trace = result[0]
    assert (trace.answer, trace.other) == (TOKENIZER.decode([best]), TOKENIZER.decode([second]))
    assert float(trace.clean[0]) == pytest.approx(float(logits.softmax(-1)[best]), abs=1e-6)
    assert float(trace.clean[1]) == pytest.approx(float(logits[best] - logits[second]), abs=1e-6)
    assert torch.equal(trace.total_effect, trace.clean - trace.corrupted)
    assert torch.equal(result.indirect_effects(0, "mlp", "logit difference"), (trace.restored[1, 1] - trace.corrupted[1]))


def test_tokens_have_roles():
    assert [role_of(token, 1, 3, 8) for token in range(8)] == ["", *ROLES[:3], ROLES[3], ROLES[4], ROLES[4], ROLES[5]]
    assert [role_of(token, 0, 0, 2) for token in range(2)] == ["last subject token", "last token"]
    assert role_of(2, 1, 2, 3) == "last token", "the answer follows it, whatever else it is"


def test_averages_are_over_tokens_of_a_role_and_then_over_facts(result):
    average = result.average_effects("mlp")
    assert average.roles == tuple(role for role in ROLES if any(role in trace.roles for trace in result))
    of_facts = []
    for trace in result:
        places = [token for token, role in enumerate(trace.roles) if role == "later tokens"]
        if places:
            of_facts.append(trace.effects[0, 1, places].mean(0))
    place = average.roles.index("later tokens")
    assert average.n[place] == len(of_facts) >= 3
    for layer in range(3):
        values = torch.stack(of_facts)[:, layer].numpy()
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        mean = average.at("later tokens", layer)
        assert (mean.value, mean.low, mean.high) == pytest.approx((values.mean(), low, high), abs=1e-12)
    layer, peak = average.peak("later tokens")
    assert peak.value == max(average.at("later tokens", layer).value for layer in range(3)) and peak == average.at("later tokens", layer)


def test_the_table_names_the_averages_their_intervals_and_what_a_trace_is_no_answer_to(result):
    text = result.table()
    assert f"clean {result.average('clean')}, corrupted {result.average('corrupted')}" in text
    for role, n in zip(result.average_effects("mlp").roles, result.average_effects("mlp").n, strict=True):
        layer, mean = result.average_effects("mlp").peak(role)
        assert f"{role} ({n})" in text and f"{mean}, {layer}" in text
    assert "Hase et al. 2023, arXiv 2301.04213" in text and "5 facts, noise of 3 deviations" in text and "2 samples" in text
    assert "logit difference of the answer" in text and "logit difference of the answer" not in result.table("probability")
    assert result.table("logit difference").count("highest indirect effect") == 1


def test_one_fact_has_no_interval(model, facts):
    found = traced(model, facts[:1], kinds="hidden")
    assert found.average("total_effect").low is None and "[" not in found.table()


# ---- facts


def test_facts_that_the_model_does_not_know_are_left_out_and_said(model, facts):
    wrong = next(word for word in ("cat", "dog") if word != facts[0].target)
    unknown = facts[0].with_target(wrong)
    found = traced(model, [unknown, facts[1]], kinds="hidden")
    assert len(found) == 1 and found[0].fact == facts[1]
    assert found.left_out[0].fact == unknown and f"the model says {facts[0].target!r}" in found.left_out[0].reason
    assert "Left out: 1 facts" in found.table() and unknown.prompt in found.table()
    with pytest.raises(EditError, match="none of the facts can be traced"):
        traced(model, [unknown])


def test_the_true_answer_is_traced_where_a_fact_has_one(model, facts):
    fact = Fact(facts[0].prompt, facts[0].subject, "cat", true=facts[0].target)
    assert torch.equal(traced(model, [fact], kinds="hidden")[0].restored, traced(model, facts[:1], kinds="hidden")[0].restored)


def test_of_several_tokens_the_first_is_traced_and_that_is_said(model, facts):
    fact = facts[0].with_target(f"{facts[0].target} tree")
    found = traced(model, [fact], kinds="hidden")
    assert (found[0].answer_tokens, found[0].answer) == (2, facts[0].target)
    assert "1 of the answers have several tokens; the first is traced." in found.table()


def test_as_many_known_facts_as_are_asked_for(model, facts):
    unknown = facts[0].with_target("cat" if facts[0].target != "cat" else "dog")
    found = traced(model, [unknown, *facts], kinds="hidden", count=2)
    assert [trace.fact for trace in found] == facts[:2] and len(found.left_out) == 1


# ---- corruptions and seeds


def test_the_same_seed_gives_the_same_and_facts_do_not_depend_on_their_order(model, facts, result):
    assert apart(traced(model, facts), result) == 0
    assert apart(traced(model, facts, seed=1), result) > 1e-5
    turned = traced(model, facts[::-1])
    assert all(torch.equal(a.restored, b.restored) for a, b in zip(turned.traces[::-1], result, strict=True))


def test_noise_has_three_deviations_of_the_subjects_and_is_on_the_subject_alone(model, facts):
    subjects = subjects_of(model, facts)
    ids = [token for prompt in subjects.prompts for token in prompt.subject_ids]
    assert subjects.deviation == pytest.approx(float(model.model.embed_tokens.weight[ids].detach().double().std()), rel=1e-6)
    noise = Noise().of(1, subjects, 400, torch.Generator().manual_seed(0)).embeddings - subjects.values[1]
    assert noise.shape == (400, 2, 32) and float(noise.std()) == pytest.approx(3 * subjects.deviation, rel=0.02)
    anatomy = Anatomy.find(model)
    passes = Passes(model, anatomy, [])
    record = passes.record(subjects.prompts[1], subjects.values[1] + noise[:1], with_cache=False)
    changed = [bool((value[1] != value[0]).any()) for value in next(iter(record.values.values())).transpose(0, 1)]
    assert [token for token, differs in enumerate(changed) if differs] == [3, 4]


def test_a_replacement_has_as_many_tokens_another_answer_and_comes_from_the_same_template_if_it_can(model, facts):
    same = Fact("the house in red tree sat on a mat is", "red tree", "no" if facts[1].target != "no" else "yes")
    subjects = subjects_of(model, [*facts, same])
    found = Replacement().of(1, subjects, 10, torch.Generator().manual_seed(0))
    assert found.facts == {"replaced_by": "red tree"} and found.embeddings.shape == (1, 2, 32)
    assert torch.equal(found.embeddings[0], subjects.values[-1])
    given = Replacement({"blue fire": "bad dog"}).of(1, subjects, 10, torch.Generator())
    assert torch.equal(given.embeddings[0], subjects.embed(TOKENIZER("bad dog").input_ids))


def test_a_fact_without_a_replacement_is_left_out(model, facts):
    found = traced(model, facts, corruption="replacement", kinds="hidden")
    assert [entry.fact for entry in found.left_out] == [facts[2]], "the only subject of one token"
    assert "no other fact has a subject of 1 tokens" in found.left_out[0].reason
    assert found[0].corruption["replaced_by"] in {"blue fire", "red tree", "cold water"}


def test_the_mean_is_that_of_the_tokens_of_all_subjects(model, facts):
    subjects = subjects_of(model, facts)
    ids = [token for prompt in subjects.prompts for token in prompt.subject_ids]
    found = CORRUPTIONS.get("mean")().of(0, subjects, 10, torch.Generator()).embeddings
    assert torch.allclose(found, model.model.embed_tokens.weight[ids].mean(0).expand(1, 2, 32), atol=1e-6)


# ---- files


def test_a_trace_is_saved_and_loaded(result, tmp_path):
    for name in ("trace.safetensors", "trace"):
        again = TraceResult.load(result.save(tmp_path / name))
        assert again.table() == result.table() and apart(again, result) == 0 and again.about == result.about
        assert again.traces[1].tokens == result.traces[1].tokens and repr(again) == repr(result)


def test_a_damaged_trace_is_a_typed_error(result, tmp_path):
    folder = result.save(tmp_path / "trace")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["facts"][0].pop("tokens")
    content = {key: value for key, value in manifest.items() if key != "json_sha256"}
    content["json_sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match="causal trace"):
        TraceResult.load(folder)
    with pytest.raises(WrongKindError):
        TraceResult.load(save_artifact(tmp_path / "other", "plan", {}, {}))


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"facts": []}, EditError, "nothing to trace"),
        ({"facts": "a fact"}, ConfigError, "a list of facts"),
        ({"facts": ["a fact"]}, ConfigError, "Fact.of"),
        ({"kinds": []}, ConfigError, "restores nothing"),
        ({"kinds": ["hiden"]}, ConfigError, "did you mean 'hidden'"),
        ({"kinds": 3}, ConfigError, "the kinds of causal tracing"),
        ({"window": 0}, ConfigError, "the window of causal tracing"),
        ({"window": 2.5}, ConfigError, "the window of causal tracing"),
        ({"samples": 0}, ConfigError, "the number of samples"),
        ({"seed": -1}, ConfigError, "the seed"),
        ({"count": 0}, ConfigError, "the number of facts"),
        ({"max_tokens": 0}, ConfigError, "max_tokens"),
        ({"severed": "hidden"}, ConfigError, "what causal tracing severs"),
        ({"severed": "mlp"}, ConfigError, "severed and restored"),
        ({"corruption": "nois"}, ConfigError, "did you mean 'noise'"),
        ({"corruption": Replacement({"red cat": "cat"})}, EditError, "cannot take the place of 'red cat'"),
        ({"corruption": Replacement({"red cat": "one two three"})}, EditError, "cannot take the place of 'red cat'"),
    ],
)
def test_bad_input_is_a_typed_error(model, facts, options, error, words):
    given = options.pop("facts", facts)
    with pytest.raises(error) as raised:
        causal_trace(model, TOKENIZER, given, progress=False, **options)
    assert words in str(raised.value)


def test_other_bad_input(model, facts):
    with pytest.raises(SubjectNotFoundError):
        Fact("the cat sat on", "dog", "mat")
    with pytest.raises(EditError, match="mean of one subject"):
        traced(model, facts[:1], corruption="mean")
    with pytest.raises(ConfigError, match="cannot be made with these settings"):
        corruption_of("noise", {"sigma": 3})
    with pytest.raises(ConfigError, match="the deviations of the noise"):
        Noise(0)
    with pytest.raises(SteerError):
        causal_trace(model.model, TOKENIZER, facts, progress=False)  # no logits
    with pytest.raises(ConfigError, match="the kind of a trace"):
        traced(model, facts[:1], kinds="hidden").average_effects("mlp")
