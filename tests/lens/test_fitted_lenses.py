"""Tuned and Jacobian lenses: what is fitted agrees with autograd, files of either program round-trip, and damaged ones are refused."""

import json

import pytest
import torch
from families import FAMILIES, LAYERS, VOCAB, WIDTH
from hand import hook_count, ids

import steer
from steer.errors import (
    ConfigError,
    ContrastError,
    DamagedFileError,
    FileError,
    NonFiniteError,
    SiteError,
    UnsafeFileError,
    WidthError,
    WrongModelError,
)
from steer.lens import JacobianLens, LogitLens, Readout, TunedLens, lens_reading, load_lens
from steer.model.tokens import Row


def texts(count: int, tokens: int = 9) -> list[Row]:
    return [Row(tuple(ids(1, tokens, seed)[0].tolist()), 1) for seed in range(count)]


def random_tensors(parts: dict[str, tuple[int, ...]], depths) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {f"{depth}.{part}": 0.1 * torch.randn(shape, generator=generator) for depth in depths for part, shape in parts.items()}


TUNED = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}


def tuned(model) -> TunedLens:
    return TunedLens(Readout.of(model), random_tensors(TUNED, range(LAYERS)))


# ---- tuned lens


def test_a_tuned_lens_of_zeros_is_the_logit_lens(tiny):
    model = tiny("llama")
    zeros = TunedLens(Readout.of(model), {name: torch.zeros_like(t) for name, t in random_tensors(TUNED, range(LAYERS)).items()})
    row = texts(1)[0]
    a, b = lens_reading(zeros, row), lens_reading(LogitLens.of(model), row)
    assert a.sites == b.sites and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("top", "probabilities", "entropy", "kl"))


def test_a_translator_is_affine_and_residual(tiny):
    lens = tuned(tiny("llama"))
    h = torch.randn(2, 3, WIDTH)
    weight, bias = lens.tensors["2.weight"], lens.tensors["2.bias"]
    expected = h + h @ weight.mT + bias
    assert torch.allclose(lens.translated(h, "layers.1.output"), expected, atol=1e-5)
    assert torch.equal(lens.translated(h, "layers.1.output"), lens.translated(h, "layers.2.input"))
    assert torch.equal(lens.translated(h, f"layers.{LAYERS - 1}.output"), h)  # behind the last block nothing is translated
    row = lens.readout.unembedding[7]
    assert torch.allclose(lens.token_vector(7, "layers.1.output"), row + row @ weight, atol=1e-5)


def test_fitting_lowers_the_divergence_on_texts_that_were_not_fitted(tiny):
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lens = TunedLens.fit(model, texts(24), sites=["embed", "layers.*.output"], steps=60, learning_rate=0.01, held_out=8, progress=False)
    assert lens.depths == (0, 1, 2, 3) and set(lens.tensors) == {f"{d}.{p}" for d in range(3) for p in ("weight", "bias")}
    for site in ("embed", "layers.0.output", "layers.1.output"):
        assert lens.metrics[f"kl/{site}"] < 0.8 * lens.metrics[f"kl_logit/{site}"]
    judged = [lens_reading(lens, row, sites=["layers.1.output"]).kl[0, 0:] for row in texts(24)[-8:]]
    assert lens.metrics["kl/layers.1.output"] == pytest.approx(float(torch.cat(judged).mean()), rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hook_count(model) == 0 and all(p.grad is None for p in model.parameters())


def test_files_of_tuned_lens_round_trip(tiny, tmp_path):
    """The layout of the package tuned-lens: one translator a block, numbered by what goes into it."""
    model = tiny("llama")
    lens = tuned(model)
    lens.export(tmp_path / "theirs", base_model="tiny")
    state = torch.load(tmp_path / "theirs" / "params.pt", weights_only=True)
    assert list(state) == [f"{block}.{part}" for block in range(LAYERS) for part in ("weight", "bias")]
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (config["d_model"], config["num_hidden_layers"], config["lens_type"]) == (WIDTH, LAYERS, "linear_tuned_lens")
    for loaded in (load_lens(model, tmp_path / "theirs"), load_lens(model, lens.save(tmp_path / "ours"))):
        assert isinstance(loaded, TunedLens) and all(torch.equal(loaded.tensors[name], lens.tensors[name]) for name in lens.tensors)


def test_another_unembedding_is_told(tiny, tmp_path):
    model = tiny("llama")
    tuned(model).export(tmp_path / "lens")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    with pytest.warns(UserWarning, match="another unembedding"):
        load_lens(model, tmp_path / "lens")


# ---- Jacobian lens


def by_autograd(model, row: Row, depth: int, skip: int) -> torch.Tensor:
    """[width, width], from the full Jacobian of the last block's output by the stream at a depth."""
    inside = model.model
    with torch.no_grad():
        hidden = inside(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[depth]
    position = torch.arange(len(row.ids))[None]
    rotary = inside.rotary_emb(hidden, position)
    mask = torch.full((len(row.ids), len(row.ids)), -torch.inf).triu(1)[None, None]

    def rest(h):
        for block in inside.layers[depth:]:
            h = block(h, attention_mask=mask, position_embeddings=rotary, position_ids=position)
        return h[0]

    full = torch.autograd.functional.jacobian(rest, hidden)[:, :, 0]  # [target, width, source, width]
    used = slice(skip, len(row.ids) - 1)
    return full[used, :, used].sum(0).mean(1)


@pytest.mark.parametrize("skip", [0, 3])
def test_the_jacobian_is_that_of_autograd(skip, tiny):
    model = tiny("llama")
    rows = texts(2, tokens=7)
    lens = JacobianLens.fit(model, rows, sites=["embed", "layers.*.output"], skip=skip, rows_of_matrix=5, progress=False)
    assert lens.depths == (0, 1, 2, 3) and hook_count(model) == 0
    for depth in range(LAYERS):
        expected = torch.stack([by_autograd(model, row, depth, skip) for row in rows]).mean(0)
        assert torch.allclose(lens.tensors[f"{depth}.matrix"], expected, atol=1e-4)
    assert not torch.allclose(lens.tensors["0.matrix"], torch.eye(WIDTH), atol=0.1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "falcon"])
def test_the_jacobian_of_any_family_is_that_of_small_steps(family):
    """The same step at all used tokens moves the sum over used tokens of the last block's output by their number times J."""
    model, row = FAMILIES[family](), texts(1, 6)[0]
    lens = JacobianLens.fit(model, [row], sites=["layers.1.output"], skip=1, progress=False)
    step = 0.01 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    plan = steer.Plan(steer.Intervention(steer.Add(step), "layers.1.output", scope="positions[1:5]"))
    sums = []
    with plan.attached(model) as attachment, torch.no_grad():
        for strength in (1.0, -1.0):
            attachment.set_strength(strength)
            sums.append(lens.readout.run([row], [LAYERS])[0][LAYERS][0, 1:5].sum(0))
    measured, predicted = (sums[0] - sums[1]) / 2, 4 * lens.tensors["2.matrix"] @ step
    assert float((measured - predicted).norm()) < 0.01 * float(predicted.norm())
    assert float((step * 4 - predicted).norm()) > 0.1 * float(predicted.norm()) and lens.settings == {"texts": 1, "skip": 1}


def test_published_jacobian_files_round_trip(tiny, tmp_path):
    model = tiny("llama")
    lens = JacobianLens(Readout.of(model), random_tensors({"matrix": (WIDTH, WIDTH)}, (1, 2)), settings={"texts": 3})
    content = torch.load(lens.export(tmp_path / "lens.pt"), weights_only=True)
    assert content["source_layers"] == [0, 1] and content["d_model"] == WIDTH and content["n_prompts"] == 3
    loaded = load_lens(model, tmp_path / "lens.pt")
    assert [str(site) for site in loaded.sites] == ["layers.0.output", "layers.1.output", f"layers.{LAYERS - 1}.output"]
    h = torch.randn(4, WIDTH)
    assert torch.allclose(loaded.translated(h, "layers.1.output"), h @ content["J"][1].float().mT, atol=1e-5)
    assert torch.allclose(loaded.token_vector(5, "layers.0.output"), model.lm_head.weight[5].detach() @ content["J"][0].float(), atol=1e-5)
    ours = load_lens(model, lens.save(tmp_path / "ours"))
    assert isinstance(ours, JacobianLens) and torch.equal(ours.tensors["2.matrix"], lens.tensors["2.matrix"])
    with pytest.raises(SiteError, match="was not fitted at 'embed'"):
        loaded.logits(h, "embed")


# ---- damaged files, bad input


def altered(tmp_path, model, change) -> object:
    """The files of a tuned lens, one thing of them changed."""
    folder = tuned(model).export(tmp_path / "lens")
    state = torch.load(folder / "params.pt", weights_only=True)
    config = json.loads((folder / "config.json").read_text())
    change(state, config)
    torch.save(state, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda state, config: state.pop("1.weight"), DamagedFileError, "params.pt(.|\n)*<0 to 2>"),
        (lambda state, config: state.update({"0.weight": torch.zeros(3, 3)}), WidthError, "0.weight(.|\n)*32, 32(.|\n)*3, 3"),
        (lambda state, config: state["0.bias"].fill_(float("nan")), NonFiniteError, "0.bias"),
        (lambda state, config: config.update(d_model=7), WrongModelError, "width(.|\n)*7"),
        (lambda state, config: config.update(num_hidden_layers=5), WrongModelError, "n_layers(.|\n)*5"),
        (lambda state, config: config.pop("d_model"), DamagedFileError, "d_model"),
        (lambda state, config: config.update(lens_type="another"), DamagedFileError, "another"),
        (lambda state, config: state.update({"0.weight": 3}), DamagedFileError, "params.pt"),
    ],
)
def test_damaged_files_of_a_tuned_lens_are_refused(change, error, match, tiny, tmp_path):
    model = tiny("llama")
    with pytest.raises(error, match=match):
        load_lens(model, altered(tmp_path, model, change))


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        ({"d_model": WIDTH}, DamagedFileError, "no file|J: "),
        ({"J": {0: torch.zeros(3, 3)}, "d_model": WIDTH}, WidthError, "0|1.matrix"),
        ({"J": {0: torch.zeros(WIDTH, WIDTH)}, "d_model": 8}, WrongModelError, "width(.|\n)*8"),
        ({"J": {9: torch.zeros(WIDTH, WIDTH)}, "d_model": WIDTH}, DamagedFileError, "blocks 9 to 9"),
        ({"J": {"a": torch.zeros(WIDTH, WIDTH)}, "d_model": WIDTH}, DamagedFileError, "by number"),
        ({"J": {0: torch.full((WIDTH, WIDTH), float("inf"))}, "d_model": WIDTH}, NonFiniteError, "1.matrix"),
        ({"J": {0: torch.zeros(WIDTH, WIDTH)}, "d_model": WIDTH, "metadata": {"target_layer": 1}}, DamagedFileError, "not the last"),
        ([1, 2], DamagedFileError, "list"),
    ],
)
def test_damaged_jacobian_files_are_refused(content, error, match, tiny, tmp_path):
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(error, match=match):
        load_lens(tiny("llama"), tmp_path / "lens.pt")


class Anything:
    """A class that a file must not make an object of."""


def test_files_with_objects_and_of_other_kinds_are_refused(tiny, tmp_path):
    torch.save({"J": Anything()}, tmp_path / "lens.pt")
    with pytest.raises(UnsafeFileError):
        load_lens(tiny("llama"), tmp_path / "lens.pt")
    whole = JacobianLens(Readout.of(tiny("llama")), random_tensors({"matrix": (WIDTH, WIDTH)}, (1,))).save(tmp_path / "whole.safetensors")
    other = FAMILIES["llama"](hidden_size=64)
    with pytest.raises(WrongModelError, match="belongs to another model(.|\n)*32(.|\n)*64"):
        load_lens(other, whole)
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(DamagedFileError):
        load_lens(tiny("llama"), whole)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda m: TunedLens.fit(m, texts(3), held_out=3, progress=False), ContrastError, "too few texts"),
        (lambda m: TunedLens.fit(m, [*texts(3), texts(1)[0]], held_out=1, progress=False), ContrastError, "held out too"),
        (lambda m: TunedLens.fit(m, texts(3), steps=0, held_out=1, progress=False), ConfigError, "training steps"),
        (lambda m: TunedLens.fit(m, texts(3), sites=["layers.2.output"], held_out=1, progress=False), ConfigError, "nothing to fit"),
        (lambda m: TunedLens.fit(m, [Row((3, VOCAB), 1)] * 3, held_out=1, progress=False), ContrastError, "held out too"),
        (lambda m: JacobianLens.fit(m, texts(2), progress=False), ContrastError, "too short for a Jacobian lens(.|\n)*18 tokens"),
        (lambda m: JacobianLens.fit(m, [], skip=0, progress=False), ContrastError, "too short"),
        (lambda m: TunedLens(Readout.of(m), {"1.other": torch.zeros(2)}), ConfigError, "no tensor '1.other'"),
        (lambda m: load_lens(m, 3), ConfigError, "the path of a file"),
    ],
)
def test_bad_input_is_refused(wrong, error, match, tiny):
    with pytest.raises(error, match=match):
        wrong(tiny("llama"))


# ---- the hub


class Hub:
    """A hub with one space, of which each fetch is recorded."""

    def __init__(self, folder) -> None:
        self.folder, self.fetched = folder, []

    def list_repo_files(self, repository, revision=None, repo_type="model"):
        if (repository, repo_type) != ("owner/lenses", "space"):
            raise LookupError("no such repository")
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def download(self, repository, name, revision=None, repo_type="model"):
        self.fetched.append((name, revision))
        return str(self.folder / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.list_repo_files)
    return made


def test_of_a_repository_only_the_files_of_the_lens_are_fetched(tiny, hub):
    model = tiny("llama")
    affine, jacobian = tuned(model), JacobianLens(Readout.of(model), random_tensors({"matrix": (WIDTH, WIDTH)}, range(1, LAYERS)))
    (hub.folder / "other").mkdir(parents=True)
    affine.export(hub.folder / "lens" / "llama")
    (hub.folder / "lens" / "llama" / "weights.safetensors").write_text("large")
    jacobian.export(hub.folder / "j" / "llama.pt")
    affine.save(hub.folder / "ours")
    for where, fetched, expected in (
        ("spaces/owner/lenses/lens/llama", ["lens/llama/config.json", "lens/llama/params.pt"], affine),
        ("hf://spaces/owner/lenses/j/llama.pt@v2", ["j/llama.pt"], jacobian),
        ("spaces/owner/lenses/j", ["j/llama.pt"], jacobian),
        ("spaces/owner/lenses/ours", ["ours/manifest.json", "ours/tensors.safetensors"], affine),
    ):
        hub.fetched.clear()
        loaded = load_lens(model, where)
        assert [name for name, _ in hub.fetched] == fetched and {at for _, at in hub.fetched} == {"v2" if "@" in where else None}
        assert type(loaded) is type(expected)
        assert all(torch.allclose(tensor, expected.tensors[name], atol=1e-3) for name, tensor in loaded.tensors.items())
        assert any(tensor.any() for tensor in loaded.tensors.values())


def test_a_repository_without_a_lens_says_what_is_there(tiny, hub):
    (hub.folder / "two").mkdir(parents=True)
    for name in ("a.pt", "b.pt"):
        (hub.folder / "two" / name).write_text("")
    with pytest.raises(FileError, match="no lens in 'spaces/owner/lenses/two'") as error:
        load_lens(tiny("llama"), "spaces/owner/lenses/two")
    assert "a.pt, b.pt" in str(error.value.found) and not hub.fetched
    with pytest.raises(FileError, match="cannot be read from the hub"):
        load_lens(tiny("llama"), "owner/lenses/two")
    with pytest.raises(FileError, match="no lens at"):
        load_lens(tiny("llama"), "./nothing")
