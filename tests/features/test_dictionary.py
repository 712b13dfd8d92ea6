"""Dictionaries made here: crosscoders, low-rank decoders, Matryoshka prefixes, tokens that are left out, the hub, SAELens' files."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from features import feature_plans
from features.dictionary_files import CASES, D, N, Numbers, saelens
from features.test_formats import activations, close, load

import steer
from steer.errors import ConfigError, FileError, WidthError
from steer.features import Encoder, InMemory, LowRank, Origin, Untrained
from steer.features.activations.batchtopk import BatchTopK
from steer.features.activations.jumprelu import JumpReLU
from steer.features.activations.relu import ReLU
from steer.features.activations.topk import TopK
from steer.features.architectures.cross_layer_transcoder import CrossLayerTranscoder
from steer.features.architectures.crosscoder import Crosscoder
from steer.features.architectures.sparse_autoencoder import SparseAutoencoder
from steer.features.hooks import of_gemma, of_sparsify, of_transformer_lens, to_transformer_lens
from steer.model.site import Site

make = Numbers(20)
SITE = Origin(("layers.1.output",), ("layers.1.output",))


def autoencoder(origin: Origin = SITE, **options: object) -> SparseAutoencoder:
    encoder = Encoder(InMemory(make(N, D)), make(N), options.pop("activation", ReLU()))
    return SparseAutoencoder(encoder, InMemory(make(N, D)), make(D), origin, **options)


def test_a_crosscoder_reads_the_sum_over_its_models(tmp_path: Path) -> None:
    sites = ("layers.1.output",) * 2
    w_enc, w_dec, b_enc, b_dec = make(N, 2, D), make(N, 2, D), make(N), make(2, D)
    encoder = Encoder(InMemory(w_enc), b_enc, BatchTopK(1.5, 4))
    crosscoder = Crosscoder(encoder, InMemory(w_dec), b_dec, Origin(sites, sites, models=("base", "chat")))
    h = torch.randn(5, 2, D, dtype=torch.float64)
    pre = torch.einsum("tsd,nsd->tn", h, w_enc.double()) + b_enc.double()
    f = torch.where(pre > 1.5, pre, 0.0)
    close(crosscoder.encode(h), f, 1e-9)
    close(crosscoder.decode(f), torch.einsum("tn,nsd->tsd", f, w_dec.double()) + b_dec.double(), 1e-9)
    close(crosscoder.encode_selected(h, [4, 2]), f[:, [4, 2]], 1e-9)
    close(crosscoder.decode_selected(f[:, [4, 2]], [4, 2]), torch.einsum("tn,nsd->tsd", f[:, [4, 2]], w_dec[[4, 2]].double()), 1e-9)
    again = steer.load_dictionary(crosscoder.save(tmp_path / "crosscoder"))
    close(again.encode(h), f, 1e-6)
    assert again.origin.models == ("base", "chat")
    factors = torch.tensor([0.5, 2.0])
    scaled = crosscoder.scaled(factors)  # trained on activations times 0.5 and times 2
    plain = h / factors[:, None].double()
    close(scaled.encode(plain), f, 1e-6)
    close(scaled.decode(f), crosscoder.decode(f) / factors[:, None].double(), 1e-6)


def test_a_crosscoder_needs_a_site_for_each_row() -> None:
    encoder = Encoder(InMemory(make(N, 3, D)), None, ReLU())
    with pytest.raises(ConfigError, match=r"\[features, 1, width\]"):
        Crosscoder(encoder, InMemory(make(N, 3, D)), make(3, D), SITE)
    three = tuple(f"layers.{layer}.output" for layer in range(3))
    with pytest.raises(ConfigError, match="the name of each"):
        Crosscoder(encoder, InMemory(make(N, 3, D)), make(3, D), Origin(three, three, models=("base",)))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_low_rank_decoders_are_the_product_of_their_factors(tmp_path: Path, dtype: str) -> None:
    left, right, own = make(N, 2, 3), make(2, 3, D), make(N, 1, D)
    encoders = [Encoder(InMemory(make(N, D)), make(N), ReLU()) for _ in range(2)]
    origin = Origin(("layers.0.mlp.input", "layers.1.mlp.input"), ("layers.0.mlp.output", "layers.1.mlp.output"))
    low, bias = LowRank(InMemory(left), right), make(2, D)
    clt = CrossLayerTranscoder(encoders, [low, InMemory(own)], [[0, 1], [1]], bias, origin)
    product = torch.einsum("nsr,srd->nsd", left, right)
    plain = CrossLayerTranscoder(encoders, [InMemory(product), InMemory(own)], [[0, 1], [1]], bias, origin)
    h = torch.randn(4, 2, D, dtype=torch.float64)
    close(clt.reconstruct(h), plain.reconstruct(h), 1e-6)
    features = [clt.feature(1, 3), clt.feature(0, 5)]
    assert features == [N + 3, 5] and clt.layer_of(N + 3) == (1, 3)
    close(clt.decoder_rows(features), plain.decoder_rows(features).double(), 1e-6)
    assert not clt.decoder_rows(features)[0, 0].any()  # the second layer does not write the first
    again = steer.load_dictionary(clt.save(tmp_path / "clt", dtype=dtype))
    assert isinstance(again.decoders[0], LowRank)
    close(again.reconstruct(h), plain.reconstruct(h), 1e-5 if dtype == "float32" else 0.1)
    with pytest.raises(ConfigError, match="no feature 0 of layer 2"):
        clt.feature(2, 0)


def test_the_prefixes_of_a_matryoshka_dictionary() -> None:
    whole = autoencoder(activation=BatchTopK(0.5), prefixes=(5, 12, N))
    h = torch.randn(6, D, dtype=torch.float64)
    small = whole.prefix(1)
    assert (small.width, small.prefixes) == (12, (5, 12))
    f = whole.encode(h)
    close(small.encode(h), f[:, :12], 1e-12)
    f[:, 12:] = 0
    close(small.reconstruct(h), whole.decode(f), 1e-9)
    with pytest.raises(ConfigError, match="no prefix 3"):
        whole.prefix(3)
    with pytest.raises(ConfigError, match="do not fit"):
        autoencoder(prefixes=(5, 12))


def test_tokens_that_were_not_trained_on_have_no_features() -> None:
    h = torch.randn(2, 5, D)
    h[1, 3] *= 1000
    positions = torch.arange(5).expand(2, 5)
    dictionary = autoencoder(Origin(("layers.1.output",), ("layers.1.output",), untrained=Untrained(first=2, max_norm=100.0)))
    plain = dictionary.encoder.encode(h)
    left_out = torch.zeros(2, 5, dtype=torch.bool)
    left_out[1, 3] = True
    assert torch.equal(dictionary.encode(h), plain.masked_fill(left_out[..., None], 0))
    left_out[:, :2] = True
    assert torch.equal(dictionary.encode(h, positions=positions), plain.masked_fill(left_out[..., None], 0))
    close(dictionary.encode_selected(h, [3], positions=positions), plain[..., [3]].masked_fill(left_out[..., None], 0).double(), 1e-6)
    for wrong in ({"first": -1}, {"max_norm": 0.0}, {"first": 1.5}):
        with pytest.raises(ConfigError):
            Untrained(**wrong)


def test_half_precision_is_computed_in_fp32() -> None:
    dictionary, h = autoencoder(), torch.randn(3, D).bfloat16()
    assert dictionary.encode(h).dtype is torch.float32
    assert torch.equal(dictionary.encode(h), dictionary.encode(h.float()))


def test_gradients_reach_the_weights_of_a_dictionary_in_training() -> None:
    weights = make(N, D).requires_grad_()
    dictionary = SparseAutoencoder(Encoder(InMemory(weights), None, TopK(3)), InMemory(weights), torch.zeros(D), SITE)
    for _ in range(2):
        dictionary.error(torch.randn(4, D)).square().sum().backward()
    assert weights.grad is not None and float(weights.grad.abs().sum()) > 0


def test_selected_features_of_a_topk_dictionary_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, h = autoencoder(activation=TopK(4)), torch.randn(3, 7, D, dtype=torch.float64)
    monkeypatch.setattr("steer.features.encoder.TILE", 2 * N)
    close(dictionary.encode_selected(h, [1, 5, 9]), dictionary.encode(h)[..., [1, 5, 9]], 1e-12)


def test_parts_that_do_not_fit_together() -> None:
    rows = InMemory(make(N, D))
    with pytest.raises(WidthError, match="the bias of an encoder"):
        Encoder(rows, make(N + 1), ReLU())
    with pytest.raises(WidthError, match="threshold"):
        Encoder(rows, None, JumpReLU(make(N - 1)))
    with pytest.raises(ConfigError, match="different numbers of features"):
        SparseAutoencoder(Encoder(rows, None, ReLU()), InMemory(make(N + 1, D)), make(D), SITE)
    with pytest.raises(ConfigError, match="norm of an encoder"):
        Encoder(rows, None, ReLU(), norm="batch_norm")


# ---- files


WRITTEN = [name for name in CASES if not name.startswith(("gemma_scope_2 c", "circuit_tracer", "sparsify", "openai TopK_s"))]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_for_saelens_is_read_again(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    dictionary, h = load(case), activations(case)
    if dictionary.reads == (Site("embed"),):
        with pytest.raises(ConfigError, match="no hook for 'embed'"):
            dictionary.save(tmp_path / "saelens", format="saelens")
        return
    path = dictionary.save(tmp_path / "saelens", format="saelens")
    again = steer.load_dictionary(path)
    assert (again.reads, again.writes, again.untrained) == (dictionary.reads, dictionary.writes, dictionary.untrained)
    close(again.encode(h), dictionary.encode(h), 1e-5)
    close(again.reconstruct(h), dictionary.reconstruct(h), 1e-5)


def test_what_saelens_has_no_architecture_for(tmp_path: Path) -> None:
    for name in ("gemma_scope_2 clt", "openai TopK_signed", "sparsify groupmax", "sparsify transcoder", "circuit_tracer jumprelu"):
        with pytest.raises(ConfigError, match="no architecture"):
            load(CASES[name](tmp_path / name)).save(tmp_path / "saelens", format="saelens")
    with pytest.raises(ConfigError, match="no architecture"):
        autoencoder().save(tmp_path / "saelens", format="saelens", dtype="int8")


def test_a_folder_of_many_dictionaries(tmp_path: Path) -> None:
    saelens(tmp_path / "a" / "layer_2", "standard")
    dictionary = steer.load_dictionary(tmp_path / "a", "layer_2")
    assert dictionary.width == N and dictionary.source.format == "saelens"
    with pytest.raises(steer.SteerError, match="folder='...'"):
        steer.load_dictionary(tmp_path / "a")


def test_positions_that_saelens_left_out(tmp_path: Path) -> None:
    path = saelens(tmp_path, "standard").path
    content = json.loads((path / "cfg.json").read_text())
    content["metadata"]["seqpos_slice"] = [3, None]
    (path / "cfg.json").write_text(json.dumps(content))
    assert steer.load_dictionary(path).untrained == Untrained(3)
    assert steer.load_dictionary(path, untrained=Untrained(1, 50.0)).untrained == Untrained(1, 50.0)


def test_files_that_are_known_to_be_of_a_centred_model(tmp_path: Path) -> None:
    path = saelens(tmp_path / "GPT2-Small-SAEs-Reformatted" / "blocks.2.hook_resid_pre", "standard").path
    plain = saelens(tmp_path / "other", "standard").path
    h = torch.randn(4, D, dtype=torch.float64)
    centred = steer.load_dictionary(path)
    close(centred.encode(h), steer.load_dictionary(plain).encode(h - h.mean(-1, keepdim=True)), 1e-12)
    close(centred.error(h), steer.load_dictionary(plain).error(h - h.mean(-1, keepdim=True)), 1e-9)


class Hub:
    """A hub with one repository, which counts what is fetched."""

    def __init__(self, files: Path) -> None:
        self.files = files
        self.fetched: list[str] = []

    def list_repo_files(self, repository: str, revision: str | None = None, repo_type: str = "model") -> list[str]:
        if repository != "owner/dictionaries":
            raise LookupError("no such repository")
        return [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]

    def download(self, repository: str, name: str, revision: str | None = None, repo_type: str = "model") -> str:
        self.fetched.append(name)
        return str(self.files / name)


def test_of_a_repository_only_what_is_needed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    case = saelens(tmp_path / "files" / "layers" / "2", "standard")
    shutil.copytree(case.path, tmp_path / "files" / "layers" / "3")
    hub = Hub(tmp_path / "files")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.list_repo_files)
    for arguments in (("owner/dictionaries", "layers/3"), ("hf://owner/dictionaries/layers/3",), ("owner/dictionaries/layers/3@main",)):
        hub.fetched.clear()
        dictionary = steer.load_dictionary(*arguments)
        assert set(hub.fetched) == {"layers/3/cfg.json", "layers/3/sae_weights.safetensors"}
        close(dictionary.encode(activations(case)), case.encode(activations(case)))
        assert dictionary.source.place == "owner/dictionaries/layers/3"
    with pytest.raises(FileError, match="cannot be read from the hub"):
        steer.load_dictionary("owner/nothing")


# ---- hooks


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.3.hook_resid_pre", "layers.3.input"),
        ("blocks.3.hook_resid_post", "layers.3.output"),
        ("blocks.3.hook_attn_out", "layers.3.attn.output"),
        ("blocks.3.attn.hook_z", "layers.3.attn.z"),
        ("blocks.3.mlp.hook_post", "layers.3.mlp.neurons"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp.output"),
        ("blocks.3.hook_resid_mid", None),
        ("blocks.3.hook_mlp_in", None),
        ("hook_embed", None),
    ],
)
def test_hooks_of_transformer_lens(hook: str, site: str | None) -> None:
    assert of_transformer_lens(hook) == site
    if site is not None:
        assert to_transformer_lens(Site.parse(site)) == hook


def test_hooks_of_other_programs() -> None:
    assert of_gemma("model.layers.4.self_attn.o_proj.input") == "layers.4.attn.z"
    assert of_gemma("language_model.model.layers.4.output") == "layers.4.output"
    assert of_gemma("model.norm.output") == "module:model.norm:output" and of_gemma("somewhere") is None
    assert of_sparsify("layers.4", "output") == of_sparsify("h.4", "output") == "layers.4.output"
    assert of_sparsify("layers.4.attention", "output") == "module:layers.4.attention:output"
    assert to_transformer_lens(Site("final_norm")) is None


def test_a_topk_dictionary_reconstructs_without_a_matrix_of_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = feature_plans.autoencoder("topk", norm="layer_norm", untrained=Untrained(first=1))
    h = torch.randn(3, 7, 32, dtype=torch.float64).requires_grad_()
    positions = torch.arange(7).expand(3, -1)
    by_all = dictionary.decode(dictionary.encode(h, positions=positions), h)
    (expected,) = torch.autograd.grad(by_all.square().sum(), h)

    def refuse(*_: object) -> None:
        raise AssertionError("all features were encoded")

    monkeypatch.setattr(type(dictionary), "_encode", refuse)
    out = dictionary.reconstruct(h, positions=positions)
    (gradient,) = torch.autograd.grad(out.square().sum(), h)
    torch.testing.assert_close((out, gradient), (by_all, expected), rtol=1e-10, atol=1e-10)
    assert dictionary.encoder.activation.top == 12 and float(gradient.abs().max()) > 0.1


@pytest.mark.parametrize("chosen", [[5, 33, 8], [8, 8], []])
def test_chosen_features_of_a_topk_dictionary_are_those_of_all(chosen: list[int]) -> None:
    dictionary = feature_plans.autoencoder("topk")
    h = torch.randn(3, 7, 32, dtype=torch.float64)
    f = dictionary.encode(h)
    assert torch.equal((f != 0).sum(-1).amax(), torch.tensor(12))
    torch.testing.assert_close(dictionary.encode_selected(h, chosen), f[..., chosen], rtol=1e-12, atol=1e-12)


def test_features_that_are_mostly_0_are_decoded_by_those_that_are_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no gradient is wanted: a feature that is 0 has one."""
    module = "steer.features.architectures.sparse_autoencoder"
    seen: list[int] = []
    real = importlib.import_module("steer.kernels.sparse_decode").decode_pattern
    monkeypatch.setattr(f"{module}.decode_pattern", lambda values, *rest: seen.append(len(values)) or real(values, *rest))
    dictionary = feature_plans.autoencoder("relu")
    f = torch.zeros(2, 5, feature_plans.FEATURES, dtype=torch.float64)
    f[0, 1, 3] = f[1, 4, 39] = f[1, 4, 0] = 2.0
    expected = dictionary.decode(f)
    assert not seen  # too few numbers for it to pay
    monkeypatch.setattr(f"{module}.MIN_NUMEL", 1)
    torch.testing.assert_close(dictionary.decode(f), expected)
    assert seen == [3]
    f.requires_grad_()
    (gradient,) = torch.autograd.grad(dictionary.decode(f).sum(), f)
    assert seen == [3] and bool((gradient != 0).all())
    dictionary.decode(torch.ones_like(f).detach())
    assert seen == [3]
