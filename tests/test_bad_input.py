"""Bad input gives a typed error that names the thing, what was expected, what was found, and the remedy.

One table for all of it, through the calls that a user makes. The rooms test their own errors in more detail, in the files of `DETAIL`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drift.drift_helpers import direction, prompts
from families import FAMILIES
from hand import hook_count, vector
from tiny_experiment import OVERRIDES, SMALL, write_data, write_model
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

import steer
from steer import cli, errors
from steer.directions import ContrastSet, Direction, Directions
from steer.experiment.complete import complete
from steer.files import TENSORS
from steer.model.load import load
from steer.model.tokens import Row

NAN = torch.tensor([1.0, float("nan"), float("inf"), 2.0] * 8)
PAIRS = [
    {"prompt": f"where is the {noun}", "positive": "good nice warm", "negative": "bad rude cold"} for noun in ("cat", "dog", "sun", "moon")
]


class Bench:
    """Objects that the cases use."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.model: PreTrainedModel = FAMILIES["llama"]()
        self.tokenizer = tiny_tokenizer()
        self.rows = prompts(4)
        self.contrast = ContrastSet.from_pairs(self.tokenizer, PAIRS)

    def plan(self, site: str = "layers.1.output", v: Any = None, **options: Any) -> steer.Plan:
        fingerprint = options.pop("fingerprint", None)
        return steer.Plan(steer.Intervention(steer.Add(vector() if v is None else v), site, **options), fingerprint=fingerprint)

    def attach(self, *arguments: Any, **options: Any) -> None:
        self.plan(*arguments, **options).attach(self.model)

    def extract(self, *sites: str, contrast: ContrastSet | None = None, model: Any = None, **options: Any) -> Directions:
        contrast, model = contrast or self.contrast, model or self.model
        return steer.extract(model, contrast, list(sites or ("layers.1.output",)), name="t", holdout=0.5, progress=False, **options)

    def tracker(self, *directions: Direction, store: Path | None = None) -> steer.DriftTracker:
        return steer.DriftTracker({"t": list(directions)}, probe=self.rows, controls=2, stream=False, store=store)

    def saved(self, name: str = "plan") -> Path:
        fingerprint = steer.Anatomy.find(self.model).fingerprint()
        return self.plan(fingerprint=fingerprint).save(self.folder / name)

    def broken_model(self) -> PreTrainedModel:
        self.model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
        return self.model

    def train(self, *more: str) -> None:
        """`steer train` of a tiny model on a tiny data set."""
        model, data = write_model(self.folder / "model"), write_data(self.folder / "data")
        arguments = [f"model.name={model}", f"experiment.data={data}", f"hydra.run.dir={self.folder / 'out'}", *OVERRIDES, *SMALL, *more]
        self.cli("train", *arguments)

    def cli(self, *arguments: str) -> None:
        """Runs what `steer` runs, without the last step, which prints the error."""
        cli._run_with_hydra(arguments[0], list(arguments[1:]))


def truncate(path: Path, keep: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def pickled(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"vector": torch.ones(32)}, path)
    return path


# ---- cases that take more than a line


def width_of_a_direction(b: Bench) -> None:
    b.tracker(direction("layers.1.output", width=16)).attach(b.model)


def nan_in_a_file(b: Bench) -> None:
    plan = b.plan()
    plan.interventions[0].operator.tensors["vector"][0, 3] = float("nan")
    with b.monkeypatch.context() as patch:
        patch.setattr(steer.files, "_check_finite", lambda *_: None)
        path = plan.save(b.folder / "nan")
    steer.Plan.load(path)


def plan_of_a_llama_on_a_gpt2(b: Bench) -> None:
    steer.Plan.load(b.saved()).attach(FAMILIES["gpt2"]())


def store_of_a_llama_for_a_gpt2(b: Bench) -> None:
    for family in ("llama", "gpt2"):
        with b.tracker(direction(), store=b.folder / "d.sqlite").attached(FAMILIES[family]()) as tracker:
            tracker.measure(0)


def truncated_plan(b: Bench) -> None:
    truncate(b.saved() / TENSORS)
    steer.Plan.load(b.folder / "plan")


def truncated_single_file(b: Bench) -> None:
    steer.Plan.load(truncate(b.saved("plan.safetensors")))


def altered_directions(b: Bench) -> None:
    path = b.extract().save(b.folder / "directions") / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Directions.load(path.parent)


def truncated_store(b: Bench) -> None:
    path = b.folder / "d.sqlite"
    with b.tracker(direction(), store=path).attached(b.model) as tracker:
        tracker.measure(0)
    steer.drift.DriftStore(truncate(path))


def truncated_model(b: Bench) -> None:
    truncate(write_model(b.folder / "m") / "model.safetensors")
    steer.load(b.folder / "m")


def pickled_tensors_in_a_plan(b: Bench) -> None:
    pickled(b.saved() / TENSORS)
    steer.Plan.load(b.folder / "plan")


def pickled_model(b: Bench) -> None:
    write_model(b.folder / "m")
    (b.folder / "m" / "model.safetensors").unlink()
    pickled(b.folder / "m" / "pytorch_model.bin")
    steer.load(b.folder / "m")


def no_pad_token(b: Bench) -> None:
    b.tokenizer.pad_token = None
    complete(b.model, b.tokenizer, ["who are you", "where is the cat"])


def no_pad_token_in_training(b: Bench) -> None:
    real = load

    def without(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = real(*arguments, **options)
        tokenizer.pad_token = None
        return model, tokenizer

    b.monkeypatch.setattr("steer.commands.experiment_run.load", without)
    b.train()


def full_disk(save: Callable[[Bench], object]) -> Callable[[Bench], None]:
    def case(b: Bench) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(b.folder))

        b.extract().save(b.folder / "old")
        before = (b.folder / "old" / TENSORS).read_bytes()
        b.monkeypatch.setattr(os, "fsync", full)
        try:
            save(b)
        finally:
            assert (b.folder / "old" / TENSORS).read_bytes() == before, "the old artifact is intact"
            assert {file.name for file in b.folder.iterdir()} <= {"old"}, "no temporary file is left"

    return case


S, W, N, C = errors.SiteError, errors.WidthError, errors.NonFiniteError, errors.ConfigError
CASES: dict[str, list[tuple[Callable[[Bench], object], type[errors.SteerError], tuple[str, ...]]]] = {
    "unknown site": [
        (lambda b: steer.Site.parse("layers.1.outptu"), S, ("layers.1.outptu", "layers.1.output")),
        (lambda b: steer.Site.parse(12), S, ("12", "layers.12.output")),  # type: ignore[arg-type]
        (lambda b: b.attach("layer.1.output"), S, ("layer.1.output",)),
        (lambda b: b.extract("layers.1.mpl.output"), S, ("layers.1.mpl.output", "layers.1.mlp.output")),
        (lambda b: b.attach("module:model.layer:output"), S, ("model.layer", "LlamaForCausalLM")),
        (lambda b: b.extract()["layers.2.output"], S, ("layers.2.output", "layers.1.output")),
    ],
    "layer out of range": [
        (lambda b: b.attach("layers.3.output"), S, ("layers.3.output", "0 to 2")),
        (lambda b: b.extract("layers.-4.output"), S, ("layers.-4.output", "0 to 2")),
        (lambda b: b.extract("layers.1-9.output"), S, ("layers.1-9.output", "0 to 2")),
    ],
    "width mismatch": [
        (lambda b: b.attach(v=torch.ones(16)), W, ("add@layers.1.output", "width 32", "width 16")),
        (lambda b: b.attach("layers.1.mlp.neurons"), W, ("layers.1.mlp.neurons", "width 64", "width 32")),
        (width_of_a_direction, W, ("layers.1.output", "width 32", "width 16")),
    ],
    "vector that is not finite": [
        (lambda b: steer.Add(NAN), N, ("vector", "16 of 32")),
        (lambda b: steer.Ablate(NAN), N, ("directions", "of 32")),
        (lambda b: Direction(steer.Site.parse("embed"), NAN, "x", "all"), N, ("embed", "16 of 32")),
        (lambda b: b.plan(strength=float("nan")), N, ("strength", "layers.1.output")),
        (lambda b: b.extract(model=b.broken_model()), N, ("layers.1.output",)),
        (nan_in_a_file, N, ("vector", "1 of 32")),
    ],
    "wrong model for a saved plan": [
        (plan_of_a_llama_on_a_gpt2, errors.WrongModelError, ("llama", "gpt2")),
        (store_of_a_llama_for_a_gpt2, errors.WrongModelError, ("d.sqlite", "llama", "gpt2")),
    ],
    "damaged or truncated file": [
        (truncated_plan, errors.DamagedFileError, (TENSORS,)),
        (truncated_single_file, errors.DamagedFileError, ("plan.safetensors",)),
        (altered_directions, errors.DamagedFileError, ("directions", "sha256")),
        (truncated_store, errors.DamagedFileError, ("d.sqlite",)),
        (truncated_model, errors.DamagedFileError, ("weights",)),
    ],
    "pickle where safetensors is wanted": [
        (lambda b: steer.Plan.load(pickled(b.folder / "plan.safetensors")), errors.UnsafeFileError, ("plan.safetensors", "safetensors")),
        (lambda b: steer.Plan.load(pickled(b.folder / "plan.pt")), errors.UnsafeFileError, ("plan.pt", "safetensors")),
        (lambda b: Directions.load(pickled(b.folder / "d.bin")), errors.UnsafeFileError, ("d.bin", "safetensors")),
        (pickled_tensors_in_a_plan, errors.UnsafeFileError, (TENSORS,)),
        (pickled_model, errors.UnsafeFileError, ("weights", "safetensors")),
    ],
    "empty contrast set": [
        (lambda b: ContrastSet.from_pairs(b.tokenizer, []), errors.ContrastError, ("0 positive, 0 negative",)),
        (lambda b: ContrastSet.from_sets(b.tokenizer, ["cat"], []), errors.ContrastError, ("1 positive, 0 negative",)),
        (lambda b: ContrastSet.from_pairs(b.tokenizer, PAIRS[:1] * 8), errors.ContrastError, ("positive text 1", "texts 0 and 1")),
        (lambda b: b.extract(contrast=ContrastSet.from_pairs(b.tokenizer, PAIRS[:1])), errors.ContrastError, ("hold some out",)),
        (lambda b: steer.capture(b.model, [], {}), errors.ContrastError, ("no texts",)),
        (
            lambda b: b.extract(contrast=ContrastSet(*(tuple(Row((side, i), 2) for i in range(4)) for side in (9, 7)), paired=True)),
            errors.ContrastError,
            ("response",),
        ),
    ],
    "tokenizer without pad token": [
        (no_pad_token, errors.TokenizerError, ("no pad token", "tokenizer.pad_token = tokenizer.eos_token")),
        (no_pad_token_in_training, errors.TokenizerError, ("no pad token", "tokenizer.pad_token = tokenizer.eos_token")),
    ],
    "typo in a configuration": [
        (lambda b: b.cli("train", "experiment.train.stpes=1"), C, ("experiment.train.stpes", "experiment.train.steps")),
        (lambda b: b.train("experiment.trait.method=mean_diference"), C, ("mean_diference", "mean_difference")),
        (lambda b: b.train("experiment.scope=respons"), C, ("respons", "response")),
        (lambda b: b.train("experiment.scope=generated"), C, ("generated", "response")),
        (lambda b: b.train("experiment.arms.preventative.when=training"), C, ("preventative", "training", "never, train, inference")),
        (lambda b: b.train("+experiment.arms.plain.lable=1"), C, ("plain", "lable", "did you mean 'label'")),
        (lambda b: b.train("experiment.train.schedule=cosin"), C, ("cosin", "cosine")),
        (lambda b: b.train("model.dtype=float31"), C, ("float31", "float32")),
        (lambda b: b.plan(phases=("training",)), C, ("training", "train, validate, generate")),
        (lambda b: b.plan(schedule={"name": "linear", "step": 3}), C, ("linear", "step")),
        (lambda b: b.extract(span="respons"), C, ("respons", "response")),
    ],
    "full disk": [
        (full_disk(lambda b: b.plan().save(b.folder / "new")), errors.StorageFullError, ("new", "bytes")),
        (full_disk(lambda b: b.plan().save(b.folder / "new.safetensors")), errors.StorageFullError, ("new.safetensors", "bytes")),
        (full_disk(lambda b: b.extract().save(b.folder / "old")), errors.StorageFullError, ("old", "bytes")),
    ],
}
DETAIL = {
    "unknown site": "model/test_site.py model/test_anatomy.py",
    "layer out of range": "model/test_site.py model/test_anatomy.py",
    "width mismatch": "intervene/test_plan.py drift/test_tracker.py",
    "vector that is not finite": "intervene/test_operators.py directions/test_direction.py test_files.py",
    "wrong model for a saved plan": "intervene/test_plan.py drift/test_store.py",
    "damaged or truncated file": "test_files.py drift/test_store.py model/test_load.py experiment/test_data.py test_cli.py",
    "pickle where safetensors is wanted": "test_files.py model/test_load.py",
    "empty contrast set": "directions/test_contrast.py directions/test_extract.py model/test_capture.py",
    "tokenizer without pad token": "model/test_tokens.py experiment/test_complete.py",
    "typo in a configuration": "test_cli.py experiment/test_arms.py intervene/test_scope.py intervene/test_schedule.py",
    "full disk": "test_files.py drift/test_store.py model/test_load.py test_cli.py",
}
PARAMS = [pytest.param(*case, id=f"{item}-{number}") for item, cases in CASES.items() for number, case in enumerate(cases)]


@pytest.fixture
def hydra_logging() -> Iterator[None]:
    """Takes back what Hydra does to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize(("call", "error", "names"), PARAMS)
def test_bad_input_is_named_with_expected_found_and_remedy(
    call: Callable[[Bench], object],
    error: type[errors.SteerError],
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hydra_logging: None,
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    with pytest.raises(error) as caught:
        call(bench)
    said = str(caught.value)
    assert type(caught.value) is error
    assert all(name in said for name in names), said
    missing = [
        part for part in ("expected", "found", "remedy") if str(getattr(caught.value, part)).strip() in ("", "None", "[]", "()", "{}")
    ]
    assert not missing, f"{', '.join(missing)} missing in:\n{said}"
    assert hook_count(bench.model) == 0


def test_every_item_is_tested_in_more_detail_in_files_that_exist() -> None:
    assert DETAIL.keys() == CASES.keys()
    for places in DETAIL.values():
        for place in places.split():
            assert (Path(__file__).parent / place).is_file(), place
