"""Activation and path patching are exact: patching everything is the other run, one patch is what hooks by hand give."""

from __future__ import annotations

import pytest
import torch
from circuits.component_helpers import TARGET, cut, exact_model, pairs, rows, run_of
from hand import hook_count
from torch import Tensor, nn

from steer.circuits import LogitDifference, Pairs, PatchEffects, patch_effects, path_patch
from steer.circuits.component_run import TakenOut
from steer.circuits.patched_run import Patch, PatchedRun
from steer.errors import ConfigError, SiteError

CLOSE = {"rtol": 0, "atol": 2e-5}  # norms of some families compute in fp32
QUIET = {"progress": False}


def values_by_hand(model: nn.Module, texts) -> Tensor:
    with torch.no_grad():
        return torch.stack([TARGET(model(torch.tensor([row.ids])).logits[0].float(), 0).double() for row in texts.rows])


# ---- activation patching


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "mixtral"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_patching_everything_is_the_other_run(family: str, direction: str):
    model = exact_model(family)
    both = pairs(model)
    patched = PatchedRun(model, both, TARGET, direction=direction)
    graph, nothing = patched.run.graph, TakenOut.nothing(patched.run.graph)
    found = patched.values(
        [Patch(TakenOut(torch.ones_like(nothing.nodes))), Patch(TakenOut(nothing.nodes, {}, graph.possible)), Patch(nothing)]
    )
    clean, corrupted = values_by_hand(model, both.clean), values_by_hand(model, both.corrupted)
    start, end = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    torch.testing.assert_close(found, torch.stack([end, end, start]), **CLOSE)
    sites = patch_effects(model, both, TARGET, sites=["embed", "layers.1.output"], direction=direction, **QUIET)
    torch.testing.assert_close(sites.normalised, torch.ones(1, 2, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(sites.clean, clean, **CLOSE)
    torch.testing.assert_close(sites.corrupted, corrupted, **CLOSE)


def test_each_row_of_a_batch_is_its_own_patch():
    """The same whether patches stand together or alone, and as nodes and edges taken out in runs of their own."""
    model = exact_model("llama")
    both = pairs(model)
    edges = ["a0.h1->m1", "m0->a2.h3<q>", "input->a1.g1<k>", "a0.h0->a1.g0<v>", "m1->logits"]
    run = run_of(model, "resample")
    nothing = TakenOut.nothing(run.graph)
    by_edge = run.values([TakenOut(nothing.nodes, {}, cut(run, name)) for name in edges])
    for max_tokens in (1, 64, 2048):
        found = patch_effects(model, both, TARGET, edges=edges, max_tokens=max_tokens, **QUIET)
        torch.testing.assert_close(found.values[0], by_edge, **CLOSE)
    together = patch_effects(model, both, TARGET, **QUIET)
    alone = patch_effects(model, both, TARGET, max_tokens=1, **QUIET)
    assert len(together.names) == 15 and "input" not in together.names
    torch.testing.assert_close(together.values, alone.values, **CLOSE)
    torch.testing.assert_close(together["m1"], float((run.values([nothing]) - run.values([_nodes(run, "m1")])).mean()), **CLOSE)


def _nodes(run, name: str) -> TakenOut:
    amounts = torch.zeros(len(run.graph.writers), dtype=torch.float64)
    amounts[run.graph.writer_place(name)] = 1
    return TakenOut(amounts)


def test_positions_are_patched_apart_or_together():
    model = exact_model("llama")
    texts = rows(5, 5), rows(5, 5, seed=50)
    labels = [["a", "a", None, "b", "b"]] * 2
    both = Pairs.of(model, *texts, positions=labels)
    each = patch_effects(model, both, TARGET, nodes=["m0", "a1.h2"], positions="each", **QUIET)
    assert each.positions == ("a", "b") and each.values.shape == (2, 2, 2)
    only_a = Pairs.of(model, *texts, positions=[["a", "a", None, None, None]] * 2)
    torch.testing.assert_close(each.values[0], patch_effects(model, only_a, TARGET, nodes=["m0", "a1.h2"], **QUIET).values[0], **CLOSE)
    named = patch_effects(model, both, TARGET, nodes=["m0", "a1.h2"], positions=["a", "b"], **QUIET)
    torch.testing.assert_close(named.values, patch_effects(model, both, TARGET, nodes=["m0", "a1.h2"], **QUIET).values, **CLOSE)
    assert not torch.allclose(each.effects.sum(0), named.effects[0], atol=1e-4)  # no sum of separate patches
    last_block = Pairs.of(model, *texts, positions="each")
    late = patch_effects(model, last_block, TARGET, nodes=["m2"], positions="each", **QUIET)
    assert torch.equal(late.effects[:-1, 0], torch.zeros(4, dtype=torch.float64))  # the target looks at the last token alone
    assert late.effects[-1, 0].abs() > 1e-4
    assert late.table()[0] == ["m2"] and late.table()[2].shape == (1, 5)


def test_results_are_tables_drawings_and_files(tmp_path):
    model = exact_model("llama")
    found = patch_effects(model, pairs(model), TARGET, direction="denoising", **QUIET)
    layers, parts, effects = found.table()
    assert layers == ["0", "1", "2"] and parts == ["h0", "h1", "h2", "h3", "mlp"]
    assert float(effects[1, 2]) == found["a1.h2"] and float(effects[2, 4]) == found["m2"]
    assert found.plot(tmp_path / "effects.svg") and "denoising" in (tmp_path / "effects.svg").read_text()
    again = PatchEffects.load(found.save(tmp_path / "effects"))
    assert torch.equal(again.values, found.values) and again.names == found.names and again.facts == found.facts
    assert again.top(1) == found.top(1) and again.top(1)[0][2] == max(found.effects.flatten().tolist(), key=abs)
    assert "denoising" in repr(found) and torch.isfinite(found.standard_errors).all()


# ---- path patching


def ioi_by_hand(model: nn.Module, clean: Tensor, corrupted: Tensor, columns: slice, part: str, head: slice) -> float:
    """Path patching with hooks on modules of a llama: from a head of block 0 to queries or values of block 2, MLPs recomputed."""
    layers = model.model.layers
    seen: dict[tuple[str, int], Tensor] = {}

    def run(tokens: Tensor, hooks) -> Tensor:
        handles = [
            module.register_forward_hook(hook) if is_after else module.register_forward_pre_hook(hook) for module, hook, is_after in hooks
        ]
        try:
            with torch.no_grad():
                return model(tokens).logits[0].float()
        finally:
            for handle in handles:
                handle.remove()

    def keep(name: str, layer: int):
        return lambda module, args: seen.__setitem__((name, layer), args[0].clone())

    def freeze(layer: int):
        def hook(module, args):
            z = seen["clean", layer].clone()
            if layer == 0:
                z[..., columns] = seen["corrupted", 0][..., columns]
            return (z,)

        return hook

    for name, tokens in (("clean", clean), ("corrupted", corrupted)):
        run(tokens, [(layer.self_attn.o_proj, keep(name, number), False) for number, layer in enumerate(layers)])
    reader = getattr(layers[2].self_attn, f"{part}_proj")
    frozen = [(layer.self_attn.o_proj, freeze(number), False) for number, layer in enumerate(layers)]
    run(clean, [*frozen, (reader, lambda module, args, output: seen.__setitem__(("received", 2), output.clone()), True)])

    def receive(module, args, output):
        output = output.clone()
        output[..., head] = seen["received", 2][..., head]
        return output

    return float(TARGET(run(clean, [(reader, receive, True)]), 0))


@pytest.mark.parametrize(("receiver", "part", "index"), [("a2.h3<q>", "q", 3), ("a2.g1<k>", "k", 1), ("a2.g0<v>", "v", 0)])
def test_path_patching_is_what_hooks_by_hand_give(receiver: str, part: str, index: int):
    model = exact_model("llama")
    both = pairs(model, (6,))
    ids = [torch.tensor([texts.rows[0].ids]) for texts in (both.clean, both.corrupted)]
    expected = ioi_by_hand(model, *ids, slice(16, 24), part, slice(8 * index, 8 * index + 8))
    found = path_patch(model, both, TARGET, ["a0.h1", "a0.h2"], [receiver], **QUIET)
    assert float(found.values[0, 1, 0]) == pytest.approx(expected, abs=1e-6)
    direct = path_patch(model, both, TARGET, ["a0.h2"], [receiver], freeze="all", **QUIET)
    assert abs(direct["a0.h2"] - found["a0.h2"]) > 1e-6  # MLPs between carry some of it


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2"])
def test_with_everything_frozen_a_path_is_one_edge(family: str):
    model = exact_model(family)
    both = pairs(model)
    graph = run_of(model).graph
    senders = ["a0.h1", "m0", "input"]
    places = graph.readers_at(2)
    for receiver in (graph.readers[places["q"].start + 1].name, graph.readers[places["k"].start].name, "m2", "logits"):
        paths = path_patch(model, both, TARGET, senders, [receiver], freeze="all", **QUIET)
        edges = patch_effects(model, both, TARGET, edges=[f"{sender}->{receiver}" for sender in senders], **QUIET)
        torch.testing.assert_close(paths.values, edges.values, **CLOSE)
        assert (paths.effects.abs() > 1e-7).any()


def test_in_a_linear_model_paths_are_known_by_hand(tiny):
    """Without a final norm a head's direct path moves the target by its change times the unembedding, and senders add up."""
    model = tiny("llama").double()
    model.model.norm = nn.Identity()
    both = pairs(model, (6,))
    seen: list[Tensor] = []
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        for texts in (both.clean, both.corrupted):
            model(torch.tensor([texts.rows[0].ids]))
    handle.remove()
    along = (model.lm_head.weight[5] - model.lm_head.weight[9]).detach()
    by_head = [
        float((seen[0] - seen[1])[part] @ model.model.layers[1].self_attn.o_proj.weight.detach()[:, part].T @ along)
        for part in (slice(8), slice(24, 32))
    ]
    found = path_patch(model, both, TARGET, ["a1.h0", "a1.h3", ["a1.h0", "a1.h3"]], freeze="all", **QUIET)
    assert found.names == ("a1.h0", "a1.h3", "a1.h0+a1.h3")
    assert found.effects[0].tolist() == pytest.approx([*by_head, sum(by_head)], abs=1e-5)


def test_receivers_together_are_edges_together():
    """With everything frozen; the logits then read the sender's change beside what other receivers made of it."""
    model = exact_model("llama")
    both = pairs(model)
    run = run_of(model, "resample")
    for receivers in (["m2", "logits"], ["a2.h1<q>", "a2.g1<v>", "logits"], ["a1.h0<q>", "a1.h3<q>"]):
        found = path_patch(model, both, TARGET, ["m0"], receivers, freeze="all", **QUIET)
        edges = cut(run, *(f"m0->{receiver}" for receiver in receivers))
        by_edges = run.values([TakenOut(TakenOut.nothing(run.graph).nodes, {}, edges)])
        torch.testing.assert_close(found.values[0], by_edges, **CLOSE)


def test_denoising_a_path_is_noising_with_the_pairs_turned_round():
    model = exact_model("llama")
    both = pairs(model)
    denoised = path_patch(model, both, TARGET, ["m0", "a0.h3"], ["m2"], direction="denoising", **QUIET)
    noised = path_patch(model, Pairs(both.corrupted, both.clean), TARGET, ["m0", "a0.h3"], ["m2"], **QUIET)
    torch.testing.assert_close(denoised.values, noised.values)
    torch.testing.assert_close(denoised.effects, -noised.effects)


# ---- bad input


def test_what_cannot_be_patched_is_refused(tiny):
    model = tiny("llama")
    both = pairs(model)
    wrong: list[tuple[str, dict]] = [
        ("one kind", {"nodes": ["m0"], "edges": ["m0->m1"]}),
        ("no nodes", {"nodes": []}),
        ("a9.h0", {"nodes": ["a9.h0"]}),
        ("m2->m1", {"edges": ["m2->m1"]}),
        ("no token has a role", {"positions": ["subject"]}),
        ("direction", {"direction": "forwards"}),
        ("wrong type", {"nodes": "m0"}),
    ]
    for match, arguments in wrong:
        with pytest.raises(ConfigError, match=match):
            patch_effects(model, both, TARGET, **arguments, **QUIET)
    with pytest.raises(SiteError):
        patch_effects(model, both, TARGET, sites=["layers.7.output"], **QUIET)
    with pytest.raises(ConfigError, match="no receiver comes after"):
        path_patch(model, both, TARGET, ["m1", "a2.h0"], ["a1.h0<q>"], **QUIET)
    for arguments in ({"senders": []}, {"senders": [[]]}, {"senders": ["m0"], "receivers": []}):
        with pytest.raises(ConfigError, match="path patching without"):
            path_patch(model, both, TARGET, **arguments, **QUIET)
    with pytest.raises(ConfigError, match="different numbers of tokens"):
        Pairs.of(model, rows(5), rows(6))
    with pytest.raises(ConfigError, match="was not patched"):
        patch_effects(model, both, TARGET, nodes=["m0"], **QUIET)["m1"]
    assert hook_count(model) == 0


def test_hooks_go_when_a_target_stops_the_run(tiny):
    model = tiny("llama")

    def stop(logits: Tensor, prompt: int) -> Tensor:
        raise KeyboardInterrupt

    for call in (
        lambda: patch_effects(model, pairs(model), stop, **QUIET),
        lambda: path_patch(model, pairs(model), stop, ["m0"], ["m2"], **QUIET),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert hook_count(model) == 0


def test_a_pair_without_a_difference_has_no_share(tiny):
    model = tiny("llama")
    same = Pairs.of(model, rows(5), rows(5))
    found = patch_effects(model, same, LogitDifference(5, 9), nodes=["m0"], **QUIET)
    assert found["m0"] == 0 and torch.isnan(found.normalised).all()
