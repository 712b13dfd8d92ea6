"""Training of dictionaries: what is learned, that it resumes to the bit, on two processes as on one, several as each alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from families import FAMILIES
from features.planted import FEATURES, ON, SITE, Planted, learner, trained
from method_tables import check_table
from processes import run_on_ranks
from tiny_tokenizer import WORDS, tiny_tokenizer
from torch import Tensor

import steer
from steer.cli import main
from steer.errors import ConfigError, FileError, NonFiniteError, SiteError, TokenizerError
from steer.features.provenance import Untrained
from steer.features.training import (
    SPARSIFIERS,
    ActivationData,
    Calibration,
    DictionaryConfig,
    DictionaryModule,
    Optimisation,
    TokenRows,
    read_texts,
    token_rows,
)
from steer.features.training.active import ActiveFeatures, decode_active, encode_active
from steer.features.training.finished import dictionary_of, save
from steer.features.training.learner import Processes
from steer.features.training.passes import Passes
from steer.features.training.stopping import CheckpointBehindMeasurement, Patience
from steer.model.site import Site

OUT, MLP_IN, MLP_OUT = "layers.1.output", "layers.1.mlp.input", "layers.1.mlp.output"
SITES = [OUT, MLP_IN, MLP_OUT, "layers.0.mlp.input", "layers.0.mlp.output"]
TOGETHER = (["layers.0.mlp.input", MLP_IN], ["layers.0.mlp.output", MLP_OUT])

CONFIGS: dict[str, DictionaryConfig] = {
    **{name: DictionaryConfig([OUT], width=48, k=4, sparsifier=name) for name in ("batchtopk", "topk", "relu", "jumprelu", "gated")},
    "matryoshka": DictionaryConfig([OUT], width=48, k=4, prefixes=[12, 48]),
    "transcoder": DictionaryConfig([MLP_IN], [MLP_OUT], width=48, k=4, architecture="transcoder"),
    "skip": DictionaryConfig([MLP_IN], [MLP_OUT], width=48, k=4, architecture="transcoder", skip=True),
    "crosscoder": DictionaryConfig(TOGETHER[1], width=48, k=4, architecture="crosscoder"),
    "cross_layer": DictionaryConfig(*TOGETHER, width=48, k=4, architecture="cross_layer_transcoder"),
}


def rows(count: int = 60, context: int = 12, seed: int = 0) -> TokenRows:
    return TokenRows(torch.randint(7, 96, (count, context), generator=torch.Generator().manual_seed(seed)).int())


def activation_data(sites: list[str] | None = None, **options: Any) -> ActivationData:
    settings = {"batch": 64, "buffer": 200, "tokens_per_pass": 60, "held_out": 4, **options}
    return ActivationData(FAMILIES["llama"](), rows(), sites or [OUT], **settings)


def run(
    configs: list[DictionaryConfig], steps: int = 12, until: int | None = None, *, folder: Path | None = None,
    from_file: Path | None = None, sites: list[str] | None = None, options: dict[str, Any] | None = None, **trainer: Any,
) -> tuple[DictionaryModule, pl.Trainer]:  # fmt: skip
    """A run of `steps` steps that stops after `until`, with a checkpoint in a folder."""
    data = activation_data(sites, **(options or {}))
    optimisation = Optimisation(steps, lr=3e-3, lr_warmup=2, sparsity_warmup=3, dead_after=200)
    module = DictionaryModule(configs, data.calibrate(), optimisation, log_every=5)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings |= {"enable_progress_bar": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **trainer}
    made = pl.Trainer(max_steps=until or steps, **settings)
    made.fit(module, data, ckpt_path=from_file)
    if folder is not None:
        made.save_checkpoint(folder / "run.ckpt")
    return module, made


def numbers(module: DictionaryModule, number: int = 0) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.learners[number].state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---- what is learned


def test_sparse_products_and_their_gradients_are_those_of_dense_ones() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(10, 6), torch.randn(10, 5)
    weight, bias, shift, decoder = torch.randn(40, 6), torch.randn(40), torch.randn(6), torch.randn(40, 5)
    gradients = []
    for is_sparse in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (weight, bias, shift, decoder)]
        w, b, s, d = leaves
        if is_sparse:
            with torch.no_grad():
                pre = torch.nn.functional.linear(x - s, w, b)
                active = ActiveFeatures((pre > 3.0).flatten().nonzero()[:, 0], 10, 40)
            assert active.is_sparse and len(active.index) > 10
            f = encode_active(pre, x - s.detach(), w, b, s, active)
            out = decode_active(f * f, d, active)
        else:
            pre = torch.nn.functional.linear(x - s, w, b)
            f = pre * (pre > 3.0)
            out = (f * f) @ d
        (out - target).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for sparse, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


def test_a_planted_dictionary_is_found() -> None:
    planted = Planted()
    made = learner(planted, 1000)
    fvu = trained(made, planted, 1000)
    assert fvu[-1] < 0.25 < 0.6 < fvu[0]
    found = dictionary_of(made).decoder_rows(list(range(FEATURES)))
    cosine = (planted.rows @ torch.nn.functional.normalize(found, dim=1).T).max(1).values
    assert float(cosine.mean()) > 0.9
    h = planted.batch(1000)[SITE]
    assert float((dictionary_of(made).encode(h) > 0).sum(1).float().mean()) == pytest.approx(ON, rel=0.15)  # by its one threshold


def test_decoder_rows_keep_their_length_and_get_no_gradient_along_themselves() -> None:
    planted = Planted()
    made = learner(planted, 5)
    trained(made, planted, 5)
    layer = made.layers[0]
    torch.testing.assert_close(layer.decoder.norm(dim=1), torch.ones(FEATURES))
    loss, _ = made(planted.batch(), 4, Processes())
    made.zero_grad()
    loss.backward()
    layer.project_gradient()
    assert float((layer.decoder.grad * layer.decoder).sum(1).abs().max()) < 1e-4 * float(layer.decoder.grad.norm())


@pytest.mark.parametrize("aux", [0.0, 1 / 32])
def test_dead_features_come_back_by_the_auxiliary_loss_alone(aux: float) -> None:
    planted, half = Planted(), FEATURES // 2
    made = learner(planted, 300, aux=aux, dead_after=2000, lr=1e-2, lr_decay=0.0)
    layer = made.layers[0]
    with torch.no_grad():
        layer.encoder[:half] *= 0.01
        layer.bias[:half] = -1.0  # never above 0
        layer.unseen[:half] = 10_000
    trained(made, planted, 300)
    dead = int(layer.dead(2000)[:half].sum())
    assert dead < half / 2 if aux else dead == half


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_trained_measured_and_loaded_again(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    module, _ = run([config], 8, sites=SITES, limit_val_batches=1.0, val_check_interval=8, check_val_every_n_epoch=None)
    figures = module.figures[str(config.name)]
    assert 0 < figures["fvu"] < 10 and figures["l0"] > 0 and figures["tokens"] > 0 and figures["ce"] > 0
    (dictionary,) = module.dictionaries()
    again = steer.load_dictionary(dictionary.save(tmp_path / "saved"))
    h = torch.randn(5, *((2, 32) if len(config.reads) > 1 else (32,)))
    assert torch.equal(again.encode(h), dictionary.encode(h)) and torch.equal(again.reconstruct(h), dictionary.reconstruct(h))
    assert again.untrained == Untrained(1, module.learners[0].max_norm) and again.reads == config.reads and again.writes == config.writes


@pytest.mark.parametrize("name", CONFIGS)
def test_a_finished_dictionary_computes_what_the_training_computed(name: str) -> None:
    config = CONFIGS[name]
    module, trainer = run([config], 3, sites=SITES)
    made = module.learners[0]
    batch = next(trainer.datamodule.batches())
    stack = lambda sites: torch.stack([batch[site] for site in sites], 1) if len(sites) > 1 else batch[sites[0]]  # noqa: E731
    h, target = stack(made.reads), stack(made.writes)
    kept = made.kept(batch)
    assert kept is None
    dictionary = dictionary_of(made)
    if name != "topk":  # pre-activations, before anything is chosen
        x = made.scaled(batch, made.reads, None)
        layer = made.layers[-1]
        part = x[:, -layer.encoder.shape[1] :] - (made.bias if made.subtracts else 0)
        expected = torch.nn.functional.linear(part, layer.encoder, layer.bias)
        torch.testing.assert_close(dictionary.pre_activations(h)[:, -48:], expected, rtol=1e-3, atol=1e-3)
    f = dictionary.encode(h)
    scale = torch.stack([torch.tensor(made.calibration.scale[site]) for site in made.writes])
    error = (dictionary.decode(f, h) - target) * (scale[:, None] if len(made.writes) > 1 else scale)
    assert bool(torch.isfinite(error).all())


def test_every_sparsifier_is_trained() -> None:
    check_table(SPARSIFIERS, {config.sparsifier for config in CONFIGS.values()}, "CONFIGS of tests/features/test_training.py", "a config")


def test_half_precision_trains_too() -> None:
    module, _ = run([CONFIGS["batchtopk"]], 8, precision="bf16-mixed")
    full, _ = run([CONFIGS["batchtopk"]], 8)
    left, right = numbers(module)["layers.0.decoder"], numbers(full)["layers.0.decoder"]
    assert not torch.equal(left, right) and float((left * right).sum(1).mean()) > 0.95


# ---- the same again


@pytest.mark.parametrize("until", [1, 5, 8])
def test_a_run_that_was_stopped_ends_with_the_same_bits(until: int, tmp_path: Path) -> None:
    configs = [CONFIGS["batchtopk"], CONFIGS["relu"]]
    whole, _ = run(configs)
    run(configs, until=until, folder=tmp_path)
    resumed, trainer = run(configs, from_file=tmp_path / "run.ckpt")
    assert trainer.global_step == 12
    assert all(same(numbers(whole, number), numbers(resumed, number)) for number in range(2))


@pytest.mark.parametrize("options", [{"seed": 1}, {"held_out": 5}, {"outlier": 2.0}, {"outlier": None}])
def test_a_checkpoint_of_another_run_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    run([CONFIGS["batchtopk"]], until=2, folder=tmp_path)
    with pytest.raises(ConfigError, match=f"data.{next(iter(options))}"):
        run([CONFIGS["batchtopk"]], from_file=tmp_path / "run.ckpt", options=options)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run([CONFIGS["batchtopk"]], until=2, folder=tmp_path)
    other = FAMILIES["llama"]()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight[3, 4] += 1e-3  # one number, behind the site
    monkeypatch.setitem(FAMILIES, "llama", lambda: other)
    with pytest.raises(ConfigError, match="data.weights"):
        run([CONFIGS["batchtopk"]], from_file=tmp_path / "run.ckpt")


class NeverBetter(DictionaryModule):
    """Its held-out FVU is the same at every measurement but the first."""

    def log(self, name: str, value: Any, **options: Any) -> None:
        super().log(name, value if name != "val/fvu" else 1.0 if self.global_step == 2 else 0.5, **options)


@pytest.mark.parametrize("until", [4, 5, 6, 8])
def test_patience_ends_where_it_would_have_without_the_interruption(until: int, tmp_path: Path) -> None:
    def steps_of(most: int, from_file: Path | None = None) -> tuple[int, dict[str, Tensor]]:
        data = activation_data()
        module = NeverBetter([CONFIGS["topk"]], data.calibrate(), Optimisation(12, lr_warmup=2, sparsity_warmup=3))
        callbacks = [Patience(2), CheckpointBehindMeasurement(tmp_path, every=2 if until % 2 == 0 else 1, measured_every=2)]
        trainer = pl.Trainer(
            max_steps=most, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0, accelerator="cpu",
            devices=1, logger=False, enable_model_summary=False, enable_progress_bar=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=from_file)
        return trainer.global_step, numbers(module)

    assert steps_of(until)[0] == until  # 0.5 at 4 is better; the measurements at 6 and 8 are not
    (last,) = tmp_path.glob("*.ckpt")
    assert last.name == f"step={until}.ckpt"
    steps, resumed = steps_of(12, last)
    last.unlink()
    whole = steps_of(12)
    assert (steps, whole[0]) == (8, 8) and same(resumed, whole[1])


def test_figures_that_are_not_defined_do_not_keep_a_dictionary_from_being_written(tmp_path: Path) -> None:
    module, _ = run([CONFIGS["topk"]], until=2)
    figures = {"fvu": 0.5, "ce_recovered": float("nan"), "l0": 4.0}  # no loss is recovered where the mean does no harm
    folder = save(module.learners[0], tmp_path / "made", figures, model="tiny", training={"seed": 0}, dtype="float32")
    expected = {"fvu": 0.5, "ce_recovered": None, "l0": 4.0}
    assert steer.load_dictionary(folder).source.notes["metrics"] == expected
    assert json.loads((folder / "metrics.json").read_text()) == expected
    assert "| fvu | 0.5 |" in (folder / "README.md").read_text()


def test_several_dictionaries_at_once_are_each_as_if_alone() -> None:
    together, _ = run([CONFIGS["batchtopk"], CONFIGS["transcoder"], CONFIGS["jumprelu"]], 6, sites=SITES)
    for number, name in enumerate(("batchtopk", "transcoder", "jumprelu")):
        alone, _ = run([CONFIGS[name]], 6, sites=[str(site) for site in CONFIGS[name].sites])
        assert same(numbers(together, number), numbers(alone))


def test_activations_from_the_disk_are_those_of_the_model(tmp_path: Path) -> None:
    plain, cached = activation_data(), activation_data(cache=tmp_path)
    for _ in range(2):
        for left, right, _ in zip(plain.batches(), cached.batches(), range(12), strict=False):
            assert torch.equal(left[SITE], right[SITE])
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(cached.passes)
    cached.passes._forward = None  # type: ignore[method-assign, assignment]
    next(cached.batches(3))


def test_batches_do_not_depend_on_where_a_run_begins() -> None:
    data = activation_data()
    first = [batch[SITE] for batch, _ in zip(data.batches(), range(9), strict=False)]
    for start in (1, 4, 8):
        assert torch.equal(next(data.batches(start))[SITE], first[start])
    ordered = torch.cat(first[:3])
    assert len(torch.unique(ordered, dim=0)) == len(ordered)  # no token comes twice within a filling


def test_the_processes_share_the_batches_of_one() -> None:
    data = activation_data()
    for whole, left, right, _ in zip(data.batches(), data.batches(0, 0, 2), data.batches(0, 1, 2), range(5), strict=False):
        parts = torch.cat([left[SITE], right[SITE]])
        assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, whole[SITE].tolist()))
        assert 0 < len(left[SITE]) < len(whole[SITE])


def _train_on_a_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    from pytorch_lightning.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo")
    module, trainer = run([CONFIGS["batchtopk"], CONFIGS["relu"]], devices=2, strategy=strategy, use_distributed_sampler=False)
    if trainer.global_rank == 0:
        torch.save([numbers(module, number) for number in range(2)], folder / "two.pt")


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    run_on_ranks(_train_on_a_rank, tmp_path)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one, _ = run([CONFIGS["batchtopk"], CONFIGS["relu"]])
    for number in range(2):
        for name, tensor in numbers(one, number).items():
            torch.testing.assert_close(two[number][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def _measure_on_a_rank(folder: Path, held_out: int) -> None:
    options = {"limit_val_batches": None, "val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": -1, "devices": 2}
    module, trainer = run([CONFIGS["topk"]], until=4, options={"held_out": held_out}, num_nodes=1, strategy="ddp", **options)
    if trainer.global_rank == 0:
        (folder / "figures.json").write_text(json.dumps(list(module.figures.values())))


@pytest.mark.parametrize("held_out", [5, 7])
def test_processes_measure_what_one_does_however_few_rows_are_held_out(held_out: int, tmp_path: Path) -> None:
    """One pass is 5 rows: the second process has none, or the 2 that are left over."""
    run_on_ranks(_measure_on_a_rank, tmp_path, held_out)
    (two,) = json.loads((tmp_path / "figures.json").read_text())
    options = {"limit_val_batches": None, "val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": -1}
    one, _ = run([CONFIGS["topk"]], until=4, options={"held_out": held_out}, **options)
    (figures,) = one.figures.values()
    assert two == pytest.approx(figures, rel=1e-3) and figures["tokens"] == held_out * 11


# ---- what a dictionary may see


def test_first_tokens_and_outliers_are_left_out() -> None:
    data = activation_data(first=3)
    assert data.passes.tokens == data.passes.per_pass * (12 - 3)
    h = torch.randn(100, 8)
    h[7] *= 1000
    calibration = Calibration.of({SITE: h}, outlier=5.0)
    made = learner(Planted(), 1)
    made.max_norm = calibration.max_norm[SITE]
    kept = made.kept({SITE: h})
    assert kept is not None and (~kept).nonzero().flatten().tolist() == [7]
    assert calibration.scale[SITE] == pytest.approx(8**0.5 / float(h[kept].norm(dim=1).mean()))


# ---- texts


def test_rows_of_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("the cat sat\n\non the mat")
    (tmp_path / "a.md").write_text("a dog ran")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    made = token_rows(tiny_tokenizer(), read_texts(tmp_path), context=4)
    words = ["a", "dog", "ran", "<eos>", "the", "cat", "sat", "on", "the", "mat", "<eos>"]
    ids = tiny_tokenizer().convert_tokens_to_ids(words)
    assert sorted(made.ids.tolist()) == sorted([ids[:4], ids[4:8]])
    assert made.fingerprint() == token_rows(tiny_tokenizer(), read_texts(tmp_path), context=4).fingerprint()


# ---- bad input

NO_TEXT: list[tuple[Callable[..., Any], type[Exception], str]] = [
    (partial(token_rows, context=8), TokenizerError, "no text"),
    (partial(token_rows, texts=["the cat"], context=8), TokenizerError, "shorter than one row"),
    (partial(token_rows, texts="the cat", context=8), ConfigError, "wrong type"),
]


def test_texts_that_give_no_rows(tmp_path: Path) -> None:
    for make, error, said in NO_TEXT:
        options = {} if "texts" in make.keywords else {"texts": []}
        with pytest.raises(error, match=said):
            make(tiny_tokenizer(), **options)
    for where in (tmp_path, tmp_path / "nothing.txt"):
        with pytest.raises(FileError, match="no texts"):
            list(read_texts(where))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FileError, match="is no text"):
        list(read_texts(tmp_path / "bad.txt"))
    (tmp_path / "good.txt").write_text("the cat")
    assert list(read_texts(tmp_path / "good.txt", split="train", field="text")) == ["the cat"]
    for options in ({"split": "test"}, {"field": "words"}, {"subset": "raw"}):
        with pytest.raises(ConfigError, match="is no data set"):
            list(read_texts(tmp_path / "good.txt", **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 0}, "`width`"),
        ({"width": 4, "k": 5}, "more features are on"),
        ({"k": 0}, "`k`"),
        ({"sparsifier": "topp"}, "topk"),
        ({"architecture": "sea"}, "architecture"),
        ({"prefixes": [8, 4]}, "prefixes"),
        ({"skip": True}, "skip"),
        ({"writes": [MLP_OUT]}, "sites"),
        ({"reads": []}, "sites"),
    ],
)
def test_dictionaries_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DictionaryConfig(**{"reads": [OUT], "width": 16, "k": 2, **options})


def test_data_that_cannot_be() -> None:
    with pytest.raises(SiteError, match="layers.9"):
        activation_data(["layers.9.output"])
    with pytest.raises(ConfigError, match="no text to train on"):
        activation_data(held_out=60)
    for options in ({"batch": 0}, {"first": 11}, {"outlier": 0.5}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            activation_data(**options)
    data = activation_data()
    with pytest.raises(ConfigError, match="not captured"):
        DictionaryModule([CONFIGS["transcoder"]], data.calibrate(), Optimisation(1))
    with pytest.raises(ConfigError, match="name"):
        DictionaryModule([CONFIGS["topk"], CONFIGS["topk"]], data.calibrate(), Optimisation(1))


def test_activations_that_are_not_finite() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    passes = Passes(model, rows(), [Site.parse(OUT)], first=1, per_pass=4, dtype=torch.float32, cache=None)
    with pytest.raises(NonFiniteError, match=OUT):
        passes.run(0)


# ---- the command


def test_the_command_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    FAMILIES["llama"]().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (tmp_path / "book.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(2000)))
    arguments = ["features", "train", "data=book.txt", "model.name=model", "sites=[layers.0.output,layers.1.output]", "width=[32]", "k=3"]
    arguments += ["batch=100", "context=20", "buffer=400", "held_out=4", "checkpoint_every=4", "evaluate_every=4", "folder=out"]
    arguments += ["lr_warmup=2", "sparsity_warmup=2", "trainer.accelerator=cpu", "save_dtype=float32"]
    assert main([*arguments, "tokens=1200", "save_dtype=float8"]) == 2
    assert "float8" in capsys.readouterr().err and not Path("out/checkpoints").exists()  # before anything is trained
    assert main([*arguments, "tokens=1200"]) == 0
    printed = capsys.readouterr().out
    assert "layers.0.output_32" in printed and "fvu" in printed
    dictionary = steer.load_dictionary("out/layers.1.output_32")
    assert dictionary.width == 32 and dictionary.untrained.first == 1
    metrics = json.loads(Path("out/layers.1.output_32/metrics.json").read_text())
    assert metrics == dictionary.source.notes["metrics"] and set(metrics) >= {"fvu", "l0", "ce_recovered", "dead"}
    assert "layers.1.output_32" in Path("out/layers.1.output_32/README.md").read_text()
    h = torch.randn(3, 32)
    before = dictionary.encode(h)
    assert main([*arguments, "tokens=1200"]) == 0  # from its last checkpoint, which is the end
    assert torch.equal(steer.load_dictionary("out/layers.1.output_32").encode(h), before)
    capsys.readouterr()
    assert main([*arguments, "tokens=2400"]) == 2
    assert "another training" in capsys.readouterr().err
