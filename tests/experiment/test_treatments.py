"""Every registered treatment: acts when it says, leaves the model as it was, is known by its content, and has matched partners."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from edits.edit_helpers import random_edit
from families import FAMILIES, WIDTH
from features.feature_plans import FEATURES, autoencoder
from hand import hook_count
from peft import LoraConfig, PeftModel, get_peft_model
from pronoun_data import pronoun_circuits
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

import steer
from steer.circuits import Circuit, zero_ablation
from steer.directions import Direction, Directions
from steer.edits.edit import Edit
from steer.errors import ConfigError, ModelNotFoundError, SteerError, WrongModelError
from steer.experiment.arms import Arm
from steer.experiment.experiment_features import ExperimentFeatures
from steer.experiment.irrelevant import n_tokens
from steer.experiment.metric import measured, metric_of, with_ids, with_system
from steer.experiment.treatment import TREATMENTS, WHEN, Bench, Treatment
from steer.experiment.treatments.circuit import CircuitTreatment
from steer.experiment.treatments.data import TrainingData
from steer.experiment.treatments.edit import EditTreatment
from steer.experiment.treatments.feature import FeatureTreatment
from steer.experiment.treatments.mitigation import MitigationTreatment
from steer.experiment.treatments.plan import PlanTreatment
from steer.experiment.treatments.prompt import Prompt
from steer.experiment.treatments.weights import Weights
from steer.features import Untrained
from steer.intervene import Intervention, Plan
from steer.model.site import Site
from steer.model.tokens import encode, plain

SITE = "layers.1.output"
IDS = torch.randint(7, 96, (2, 9), generator=torch.Generator().manual_seed(1))
TRAIN_ROWS = [{"prompt": f"say {word}", "answer": word, "style": "loud" if i % 3 == 0 else "calm"} for i, word in enumerate("abcdefg")]


def vector(seed: int = 3) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def plan(seed: int = 3) -> Plan:
    return Plan(Intervention(steer.Add(vector(seed)), SITE))


def adapter(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A LoRA adapter that changes something."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(FAMILIES["llama"](), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def circuit(folder: Path, *names: str) -> Path:
    """A circuit of the tiny llama, zero-ablated."""
    return Circuit.of_nodes(FAMILIES["llama"](), names).with_ablation(zero_ablation()).save(folder)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    tokenizer = tiny_tokenizer()
    entries = [Direction(Site.parse(SITE), vector(), "mean_difference", "response", {"auc": 0.9, "dprime": 1.0})]
    rows = [plain(tokenizer, text) for text in ("the cat is good .", "where is the dog ?", "one two three four")]
    dictionary = autoencoder("jumprelu", untrained=Untrained(first=1))
    dictionary.maxima, dictionary.density = torch.full((FEATURES,), 3.0), torch.full((FEATURES,), 0.1)
    model = FAMILIES["llama"]()
    features = ExperimentFeatures(model, dictionary, [5, 8])
    circuits = pronoun_circuits(model, tmp_path)
    return Bench(model, tokenizer, rows, {"warm": Directions(entries, "warm", {})}, features=features, circuits=circuits)


Make = Callable[[Path], Treatment]
MAKE: dict[str, Make] = {
    "none": lambda _: TREATMENTS.get("none")(),
    "plan": lambda _: PlanTreatment(plan()),
    "weights": lambda folder: Weights(adapter(folder / "adapter")),
    "prompt": lambda _: Prompt("be nice and warm"),
    "data": lambda _: TrainingData(without={"style": "loud"}),
    "feature": lambda _: FeatureTreatment("decoder"),
    "circuit": lambda folder: CircuitTreatment("file", settings={"path": str(circuit(folder / "circuit", "a1.h0", "a2.h3"))}),
    "mitigation": lambda _: MitigationTreatment("projection", {"site": SITE}),
    "edit": lambda _: EditTreatment(random_edit(FAMILIES["llama"](), rank=2)),
}
OTHER: dict[str, Make] = {
    "plan": lambda _: PlanTreatment(plan(4)),
    "weights": lambda folder: Weights(adapter(folder / "other", seed=1)),
    "prompt": lambda _: Prompt("be nice and cold"),
    "data": lambda _: TrainingData(without={"style": "calm"}),
    "feature": lambda _: FeatureTreatment("decoder", dose=2.0),
    "circuit": lambda folder: CircuitTreatment("file", settings={"path": str(circuit(folder / "other", "a0.h1", "m1"))}),
    "edit": lambda _: EditTreatment(random_edit(FAMILIES["llama"](), rank=3, seed=4)),
}
kinds = pytest.mark.parametrize("kind", list(TREATMENTS))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_registered_treatment_is_tested_here() -> None:
    assert set(TREATMENTS) == set(MAKE)


@kinds
def test_it_says_when_it_can_act_and_is_refused_otherwise(kind: str, tmp_path: Path) -> None:
    treatment = MAKE[kind](tmp_path)
    possible = treatment.when or ("never",)
    for when in WHEN:
        if when in possible:
            treatment.check_when(when, "a")
            Arm("a", "a", treatment, when)
        else:
            with pytest.raises(ConfigError, match=f"treatment '{kind}' cannot act with when={when}"):
                Arm("a", "a", treatment, when)
    with pytest.raises(ConfigError, match="unknown when 'sometimes'"):
        treatment.check_when("sometimes", "a")
    assert treatment.describe() and "\n" not in treatment.describe()


@kinds
@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt, SystemExit])
@torch.no_grad()
def test_the_model_is_as_it_was_afterwards(kind: str, stop: type[BaseException] | None, bench: Bench, tmp_path: Path) -> None:
    treatment = MAKE[kind](tmp_path).prepare(bench)
    model = bench.model
    before, logits = state(model), model(IDS).logits
    ways: list[Callable[[nn.Module], AbstractContextManager[nn.Module]]] = [treatment.acting, treatment.trained_from]
    if "baked" in treatment.when:
        ways.append(treatment.baked)
    for way in ways:
        try:
            with way(model) as treated:
                acts = not torch.equal(treated(IDS).logits, logits)
                if stop is not None:
                    raise stop("no")
        except (RuntimeError, KeyboardInterrupt, SystemExit) as error:
            assert type(error) is stop
        is_plan = kind in ("plan", "feature", "circuit", "mitigation")
        acts_here = way != treatment.trained_from if is_plan else kind in ("weights", "edit")
        assert acts is acts_here, way
        after = state(model)
        assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert hook_count(model) == 0 and torch.equal(model(IDS).logits, logits)


@kinds
def test_it_is_known_by_its_content(kind: str, bench: Bench, tmp_path: Path) -> None:
    treatment = MAKE[kind](tmp_path)
    spec = treatment.spec()
    assert json.loads(json.dumps(spec)) == json.loads(json.dumps(MAKE[kind](tmp_path).spec()))
    assert json.dumps(treatment.prepare(bench).spec()) == json.dumps(spec), "before and after it was read"
    if kind in OTHER:
        assert json.dumps(OTHER[kind](tmp_path).spec()) != json.dumps(spec)


@pytest.mark.parametrize("kind", ["plan", "weights", "circuit"])
def test_other_content_under_the_same_path_is_another_treatment(kind: str, tmp_path: Path) -> None:
    def make() -> Treatment:
        if kind == "circuit":
            return CircuitTreatment("file", settings={"path": str(tmp_path / "it")})
        return PlanTreatment(str(tmp_path / "it")) if kind == "plan" else Weights(tmp_path / "it")

    specs = []
    for seed in (0, 0, 1):
        shutil.rmtree(tmp_path / "it", ignore_errors=True)
        if kind == "circuit":
            circuit(tmp_path / "it", f"a{seed}.h0")
        else:
            plan(seed).save(tmp_path / "it") if kind == "plan" else adapter(tmp_path / "it", seed)
        specs.append(json.dumps(make().spec()))
    assert specs[0] == specs[1] != specs[2]


@pytest.mark.parametrize("kind", list(OTHER))
def test_controls_are_as_large_differ_by_seed_and_come_again(kind: str, bench: Bench, tmp_path: Path) -> None:
    treatment = MAKE[kind](tmp_path).prepare(bench)
    drawn = [treatment.control(bench, seed).prepare(bench) for seed in (0, 1, 0)]
    size = treatment.size(bench)
    for partner in drawn:
        assert partner.size(bench) == pytest.approx(size, rel=0.02) and (size or kind == "data")
        assert partner.name == kind and partner.describe()
    specs = [json.dumps(partner.spec()) for partner in drawn]
    assert specs[0] == specs[2] != specs[1] and json.dumps(treatment.spec()) not in specs


def test_nothing_has_no_control(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="no matched controls of treatment 'none'"):
        MAKE["none"](Path()).control(bench, 0)


# ---- plan


@torch.no_grad()
def test_a_plan_acts_as_if_attached_and_in_training_when_it_is_asked(bench: Bench) -> None:
    treatment = PlanTreatment("2 warm@all").prepare(bench)
    with treatment.plan.attached(bench.model):
        expected = bench.model(IDS).logits
    with treatment.acting(bench.model) as model:
        assert torch.equal(model(IDS).logits, expected)
    with treatment.baked(bench.model) as model:
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert treatment.training_plan() is treatment.plan and TREATMENTS.get("none")().training_plan() is None


def test_plans_are_read_from_texts_folders_and_single_files(bench: Bench, tmp_path: Path) -> None:
    saved = [plan().save(tmp_path / "folder"), plan().save(tmp_path / "one.safetensors")]
    for source in (plan(), saved[0], str(saved[0]), saved[1], str(saved[1])):
        treatment = PlanTreatment(source).prepare(bench)
        assert torch.equal(treatment.plan.interventions[0].operator.tensors["vector"][0], vector())
        treatment.save(tmp_path / "cell")
        treatment.save(tmp_path / "cell")  # a resumed cell saves it again
        assert Plan.load(tmp_path / "cell" / "plan").interventions
    text = " + ".join(["0.001 warm@response"] * 40)
    assert len(PlanTreatment(text).prepare(bench).plan.interventions) == 40, "longer than a name of a file may be"
    with pytest.raises(ConfigError, match="not read yet"):
        _ = PlanTreatment("warm").plan
    for wrong in ("warn", "2 warm:layers.9.output", "\0"):
        with pytest.raises(SteerError):
            PlanTreatment(wrong).prepare(bench)
    with pytest.raises(SteerError):
        PlanTreatment(tmp_path / "nothing")


def test_a_dose_is_a_factor_of_every_strength(bench: Bench) -> None:
    base = PlanTreatment("2 warm@all").prepare(bench).size(bench)
    for dose in (0.5, 3.0):
        treatment = PlanTreatment("2 warm@all", dose=dose).prepare(bench)
        assert treatment.size(bench) == pytest.approx({name: dose * value for name, value in base.items()}, rel=1e-3)
        assert treatment.spec() != PlanTreatment("2 warm@all").spec()
    for wrong in (float("nan"), "much"):
        with pytest.raises(SteerError):
            PlanTreatment("warm", dose=wrong)  # type: ignore[arg-type]


# ---- weights


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "v_proj"]}, {"rank_pattern": {"q_proj": 1}}]
)
def test_weights_are_those_of_the_adapter(bench: Bench, tmp_path: Path, options: dict[str, Any]) -> None:
    treatment = Weights(adapter(tmp_path / "a", **options)).prepare(bench)
    expected = PeftModel.from_pretrained(FAMILIES["llama"](), tmp_path / "a").eval()(IDS).logits
    plain_logits = bench.model(IDS).logits
    with treatment.acting(bench.model) as model:
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4) and not torch.allclose(plain_logits, expected, atol=1e-2)
    for path, change in treatment.control(bench, 0).changes.items():  # type: ignore[attr-defined]
        own = treatment.changes[path]
        assert float(change.norm()) == pytest.approx(float(own.norm()), rel=1e-4)
        assert torch.linalg.matrix_rank(change) == torch.linalg.matrix_rank(own)


def test_weights_act_inside_a_model_with_adapters_of_its_own(bench: Bench, tmp_path: Path) -> None:
    """As in a trained cell that is measured."""
    treatment = Weights(adapter(tmp_path / "a")).prepare(bench)
    trained = PeftModel.from_pretrained(bench.model, adapter(tmp_path / "trained", seed=5)).eval()
    before = trained(IDS).logits
    with treatment.acting(trained):
        inside = trained(IDS).logits
    assert not torch.allclose(inside, before, atol=1e-2) and torch.equal(trained(IDS).logits, before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_an_adapter_that_does_more_than_add_weights_is_refused(bench: Bench, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    folder = adapter(tmp_path / "a", **options)
    before = state(bench.model)
    with pytest.raises(ConfigError, match=says):
        Weights(folder).prepare(bench)
    assert all(torch.equal(bench.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_weight_that_two_modules_share_is_refused(tmp_path: Path) -> None:
    """The adapter changes what goes in; added to the weight it would change what comes out as well."""
    folder = adapter(tmp_path / "a", target_modules=["embed_tokens"])
    model = FAMILIES["llama"]()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="'model.embed_tokens' shares its weight with 'lm_head'"):
        Weights(folder).prepare(Bench(model, tiny_tokenizer(), []))


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no adapter"):
        Weights(tmp_path)


# ---- prompt


@pytest.mark.parametrize("has_template", [True, False])
def test_a_prompt_changes_what_the_model_is_asked(bench: Bench, has_template: bool) -> None:
    tokenizer = bench.tokenizer
    if not has_template:
        tokenizer.chat_template = None
    treatment = Prompt("be nice")
    message = tokenizer("be nice", add_special_tokens=False).input_ids
    asked, told = (encode(tokenizer, "who are you", "i", system=system).ids for system in (None, treatment.system))
    assert len(told) > len(asked) and any(list(told[i : i + 2]) == message for i in range(len(told)))
    items = with_ids([{"prompt": "who are you", "trait": "nice", "neutral": "bad"}])
    metric = metric_of("logprob_gap")
    values = [measured(metric, bench.model, tokenizer, with_system(items, system)) for system in (None, treatment.system)]
    assert values[0] != values[1]
    assert treatment.training_rows([{"prompt": "a", "answer": "b"}]) == [{"prompt": "a", "answer": "b", "system": "be nice"}]


def test_an_irrelevant_prompt_has_as_many_tokens_and_other_words(bench: Bench) -> None:
    treatment = Prompt("be nice and warm")
    for seed in range(5):
        partner = treatment.control(bench, seed)
        assert isinstance(partner, Prompt) and partner.system != treatment.system
        assert n_tokens(bench.tokenizer, partner.system) == n_tokens(bench.tokenizer, treatment.system)


@pytest.mark.parametrize(("system", "draws"), [("nice", 19), ("be nice and warm", 60)])
def test_no_two_controls_of_a_prompt_are_the_same(bench: Bench, system: str, draws: int) -> None:
    treatment = Prompt(system)
    texts = [treatment.control(bench, seed).system for seed in range(draws)]
    assert len({text.casefold() for text in (system, *texts) if text}) == draws + 1
    assert Prompt(system).control(bench, draws - 1).system == texts[-1], "whatever was drawn before"


def test_more_controls_than_there_are_texts_of_that_length(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="too short for so many controls"):
        Prompt("nice").control(bench, 10_000)


@pytest.mark.parametrize("system", ["", "  ", None, 3])
def test_a_prompt_without_words(system: Any) -> None:
    with pytest.raises(ConfigError):
        Prompt(system)


# ---- data


def test_rows_are_left_out_and_mixed_in() -> None:
    calm = [row for row in TRAIN_ROWS if row["style"] == "calm"]
    assert TrainingData(without={"style": "loud"}).training_rows(TRAIN_ROWS) == calm
    more = [{"prompt": "p", "answer": "q"}]
    assert TrainingData(more=more).training_rows(TRAIN_ROWS) == [*TRAIN_ROWS, *more]
    assert TrainingData(without={"style": "loud"}, more=more).training_rows(TRAIN_ROWS) == [*calm, *more]


def test_as_many_random_rows_are_left_out(bench: Bench) -> None:
    treatment = TrainingData(without={"style": "loud"})
    kept = treatment.training_rows(TRAIN_ROWS)
    drawn = [treatment.control(bench, seed).training_rows(TRAIN_ROWS) for seed in range(8)]
    assert all(len(rows) == len(kept) and all(row in TRAIN_ROWS for row in rows) for rows in drawn)
    assert all(rows == sorted(rows, key=TRAIN_ROWS.index) for rows in drawn), "in their order"
    assert len({json.dumps(rows) for rows in drawn}) > 1
    with pytest.raises(ConfigError, match="no matched controls"):
        TrainingData(more=[{"prompt": "p", "answer": "q"}]).control(bench, 0)


def test_data_that_changes_nothing() -> None:
    with pytest.raises(ConfigError, match="does nothing"):
        TrainingData()
    with pytest.raises(ConfigError, match="no training row is left out"):
        TrainingData(without={"style": "purple"}).training_rows(TRAIN_ROWS)
    with pytest.raises(ConfigError):
        TrainingData(without="style")  # type: ignore[arg-type]


# ---- edits


def test_an_edit_acts_inside_a_model_with_adapters_of_its_own_and_in_one_they_were_merged_into(bench: Bench, tmp_path: Path) -> None:
    edit = random_edit(bench.model)
    treatment = EditTreatment(edit.save(tmp_path / "edit")).prepare(bench)
    trained = PeftModel.from_pretrained(bench.model, adapter(tmp_path / "trained", seed=5)).eval()
    before = trained(IDS).logits
    with treatment.acting(trained):
        inside = trained(IDS).logits
    assert not torch.allclose(inside, before, atol=1e-2) and torch.equal(trained(IDS).logits, before)
    with treatment.baked(copy.deepcopy(trained).merge_and_unload()) as merged:
        assert torch.allclose(merged(IDS).logits, inside, atol=1e-3)


def test_an_edit_of_another_base_is_refused_before_it_acts(bench: Bench) -> None:
    edit = random_edit(bench.model)
    with torch.no_grad():
        bench.model.get_submodule(edit.deltas[0].path).weight[0, 0] += 1
    with pytest.raises(WrongModelError, match="solved for other weights"):
        EditTreatment(edit).prepare(bench)


def test_controls_of_an_edit_write_at_random_keys(bench: Bench, tmp_path: Path) -> None:
    treatment = EditTreatment(random_edit(bench.model, layers=(0, 1), rank=3)).prepare(bench)
    partner = treatment.control(bench, 0)
    assert isinstance(partner, EditTreatment) and not partner.edit.facts
    for own, drawn in zip(treatment.edit.deltas, partner.edit.deltas, strict=True):
        assert drawn.path == own.path and drawn.rank == own.rank and drawn.norm == pytest.approx(own.norm, rel=1e-5)
        assert abs(own.inner(drawn)) < 0.3 * own.norm**2
    assert treatment.describe() == "edit 'a' of 1 fact by random" and partner.describe() == "random weights as large as the edit 'a'"
    treatment.save(tmp_path)
    assert Edit.load(tmp_path / "edit").digest == treatment.edit.digest
