"""Runs with components or edges taken out are exact: edges add up to nodes, single edges to what hooks by hand give."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from circuits.component_helpers import DECODERS, LENGTHS, TARGET, ablation_of, cut, exact_model, pairs, rows, run_of
from hand import hook_count
from torch import Tensor, nn

from steer.circuits import Pairs, mean_ablation, resample_ablation
from steer.circuits.component_run import ComponentRun, TakenOut
from steer.circuits.texts import Texts
from steer.errors import ConfigError

CLOSE = {"rtol": 0, "atol": 2e-5}  # norms of some families compute in fp32


def nodes(run: ComponentRun, *names: str) -> TakenOut:
    amounts = torch.zeros(len(run.graph.writers), dtype=torch.float64)
    for name in names:
        amounts[run.graph.writer_place(name)] = 1
    return TakenOut(amounts)


def edges(run: ComponentRun, mask: Tensor) -> TakenOut:
    return TakenOut(TakenOut.nothing(run.graph).nodes, {}, mask)


@pytest.mark.parametrize("family", DECODERS)
def test_edges_out_of_a_node_are_the_node_and_all_edges_are_everything(family: str):
    model = exact_model(family)
    for kind in ("mean", "resample") if family in ("llama", "gemma2") else ("resample",):
        run = run_of(model, kind)
        everything = [writer.name for writer in run.graph.writers]
        chosen = (["a0.h1"], ["a1.h0", "a1.h3"], ["m1"], ["input"], ["a0.h0", "m0", "a2.h1"], everything)
        by_edges = run.values([edges(run, cut(run, *(f"{name}->" for name in names))) for names in chosen])
        by_nodes = run.values([nodes(run, *names) for names in chosen])
        torch.testing.assert_close(by_edges, by_nodes, **CLOSE)
        full = run.values([TakenOut.nothing(run.graph)])
        assert ((by_nodes - full).abs().amax(1) > 1e-3).all()  # each of them matters


def test_no_edge_is_the_model_to_the_bit(tiny):
    model = tiny("llama")
    run = run_of(model)
    nothing = run.values([edges(run, torch.zeros_like(run.graph.possible)), TakenOut.nothing(run.graph)])
    by_hand = []
    for row in run.passes.texts.rows:
        with torch.no_grad():
            by_hand.append(TARGET(model(torch.tensor([row.ids])).logits[0], 0))
    assert torch.equal(nothing[0], nothing[1])
    torch.testing.assert_close(nothing[0].float(), torch.stack(by_hand))
    assert hook_count(model) == 0


# ---- one edge, against hooks by hand


@contextmanager
def by_hand(model: nn.Module, corrupted: Tensor, writer: tuple[str, int, int], reader: str) -> Iterator[None]:
    """Hooks on modules of a llama or gemma2: from a head of block 0 to one reader of block 1."""
    block, later = model.model.layers[0], model.model.layers[1]
    _, _, head = writer
    columns = slice(8 * head, 8 * head + 8)
    seen: dict[str, Tensor] = {}
    post = block.post_attention_layernorm if hasattr(block, "pre_feedforward_layernorm") else nn.Identity()

    def other(module, args):  # z of the counterfactual prompt
        seen["z"] = args[0].clone()

    handle = block.self_attn.o_proj.register_forward_pre_hook(other)
    with torch.no_grad():
        model(corrupted)
    handle.remove()

    def z(module, args):
        mixed = args[0].clone()
        mixed[..., columns] = seen["z"][..., columns]
        seen["change"] = post(mixed @ module.weight.T) - post(args[0] @ module.weight.T)

    def stream(module, args):
        seen["stream"] = args[0]

    handles = [block.self_attn.o_proj.register_forward_pre_hook(z)]
    if reader == "mlp":
        norm = later.pre_feedforward_layernorm if hasattr(later, "pre_feedforward_layernorm") else later.post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda module, args: (args[0] + seen["change"],)))
    else:
        part, index = reader
        projection = getattr(later.self_attn, f"{part}_proj")
        handles.append(later.input_layernorm.register_forward_pre_hook(stream))

        def move(module, args, output):
            with torch.no_grad():
                other = module.forward(later.input_layernorm.forward(seen["stream"] + seen["change"]))
            output = output.clone()
            output[..., 8 * index : 8 * index + 8] = other[..., 8 * index : 8 * index + 8]
            return output

        handles.append(projection.register_forward_hook(move))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("reader", "name"), [("mlp", "m1"), (("q", 3), "a1.h3<q>"), (("k", 1), "a1.g1<k>"), (("v", 0), "a1.g0<v>")])
def test_one_edge_is_what_hooks_by_hand_give(family: str, reader, name: str):
    model = exact_model(family)
    run = ComponentRun(model, pairs(model, (6,)), TARGET, resample_ablation())
    found = run.values([edges(run, cut(run, f"a0.h2->{name}")), TakenOut.nothing(run.graph)])
    corrupted = torch.tensor([pairs(model, (6,)).corrupted.rows[0].ids])
    with torch.no_grad(), by_hand(model, corrupted, ("a", 0, 2), reader):
        expected = TARGET(model(torch.tensor([run.passes.texts.rows[0].ids])).logits[0], 0)
    assert found[0].item() == pytest.approx(expected.item(), abs=2e-6)
    assert abs(found[0] - found[1]) > 1e-5


def test_in_a_linear_model_edges_to_the_logits_are_known_by_hand(tiny):
    """Without a final norm the target moves by the writer's change times the unembedding, and cuts add up."""
    model = tiny("llama").double()
    model.model.norm = nn.Identity()
    row = rows(6)[0]
    seen: dict[str, Tensor] = {}
    handles = [
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.update(z=args[0])),
        model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: seen.update(m=output)),
    ]
    with torch.no_grad():
        model(torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    along = model.lm_head.weight[5] - model.lm_head.weight[9]  # [width]
    head = (seen["z"][0, -1, 8:16] @ model.model.layers[1].self_attn.o_proj.weight[:, 8:16].T @ along).item()
    mlp = (seen["m"][0, -1] @ along).item()
    run = ComponentRun(model, Texts([row]), TARGET, ablation_of(model, "zero"))
    chosen = (["a1.h1->logits"], ["m2->logits"], ["a1.h1->logits", "m2->logits"])
    full, *without = run.values([TakenOut.nothing(run.graph), *(edges(run, cut(run, *names)) for names in chosen)])[:, 0].tolist()
    assert [full - value for value in without] == pytest.approx([head, mlp, head + mlp], abs=1e-6)


def test_padding_and_its_side_change_nothing(tiny):
    model = tiny("gemma2")
    mask = torch.rand(run_of(model).graph.possible.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    of_sides = []
    for side in ("right", "left"):
        run = run_of(model, "resample", side=side)
        of_sides.append(run.values([edges(run, mask & run.graph.possible)])[0])
    both = pairs(model)
    alone = []
    for clean, corrupted in zip(both.clean.rows, both.corrupted.rows, strict=True):
        run = ComponentRun(model, Pairs(Texts([clean]), Texts([corrupted])), TARGET, resample_ablation())
        alone.append(run.values([edges(run, mask & run.graph.possible)])[0, 0])
    torch.testing.assert_close(of_sides[0], torch.stack(alone), **CLOSE)
    torch.testing.assert_close(of_sides[1], torch.stack(alone), **CLOSE)


def test_means_per_position_stand_at_their_positions(tiny):
    model = tiny("llama").double()
    texts = rows(6, 6, seed=70)
    ablation = mean_ablation(model, [texts[0]], per_position=True)  # of one text: what that text writes
    both = Pairs.of(model, [texts[1]], [texts[0]])
    by_position = ComponentRun(model, both, TARGET, ablation)
    by_pair = ComponentRun(model, both, TARGET, resample_ablation())
    mask = cut(by_pair, "a0.h1->m1", "m0->", "input->a1.h2<q>")
    torch.testing.assert_close(by_position.values([edges(by_position, mask)]), by_pair.values([edges(by_pair, mask)]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="per position"):
        ComponentRun(model, Texts(rows(8)), TARGET, ablation)


def test_tokens_without_a_role_keep_their_components(tiny):
    model = tiny("llama").double()
    row = rows(6)[0]
    some = ComponentRun(model, Texts([row], [[None, None, "x", "x", None, None]]), TARGET, ablation_of(model, "zero"))
    none = ComponentRun(model, Texts([row], [[None] * 5 + ["x"]]), TARGET, ablation_of(model, "zero"))
    mask = cut(some, "m0->m1", "a0.h0->a1.h1<q>")
    everywhere = ComponentRun(model, Texts([row]), TARGET, ablation_of(model, "zero"))
    values = [run.values([edges(run, mask), nodes(run, "m1")])[:, 0] for run in (some, none, everywhere)]
    assert not any(torch.allclose(a, b) for a, b in [values[:2], values[1:], values[::2]])
    to_logits = cut(some, "m0->logits", "m2->logits")
    full = some.values([TakenOut.nothing(some.graph)])
    assert torch.equal(some.values([edges(some, to_logits)]), full)  # the last token, which the target looks at, has no role


def test_what_cannot_be_run_is_refused(tiny):
    model = tiny("llama")
    run = run_of(model)
    backwards = torch.zeros_like(run.graph.possible)
    backwards[run.graph.writer_place("m2"), run.graph.reader_place("m1")] = True
    with pytest.raises(ConfigError, match="m2->m1"):
        run.values([edges(run, backwards)])
    with pytest.raises(ConfigError, match="counterfactual"):
        ComponentRun(model, Texts(rows(*LENGTHS)), TARGET, resample_ablation())
