"""Traps of model editing: where the test of each one is, and those that need a whole edit to be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edits.edit_helpers import FACTS, equal_weights, model_of, weights_of
from edits.editor_helpers import STRONG, TOKENIZER, covariance_of, edit, probabilities

from steer.edits import Contexts, Fact, Guards, edit_facts
from steer.edits.editors.memit import MEMIT
from steer.edits.value_problem import ValueProblem
from steer.model.words import holds

EDITOR = MEMIT(value_settings=STRONG, ridge=0.01)

# what goes wrong elsewhere: tests of it, by file of this folder
TRAPS = {
    "a subject that is not in the prompt, or twice": {
        "fact_locate": ["a_subject_that_is_not_in_the_text_is_refused", "the_last_of_several_occurrences_is_meant_and_all_are_counted"]
    },
    "a subject that ends within a word, or before punctuation": {
        "fact_locate": ["a_subject_within_a_word_is_found_and_said_to_be_one", "the_last_token_of_a_subject_beside_punctuation_is_its_own"]
    },
    "blanks before a target, or nothing else": {
        "fact_locate": ["blanks_around_a_target_do_not_change_its_tokens", "an_empty_target_is_refused"]
    },
    "a subject of one token at the start of a text": {
        "keys": ["a_subject_at_the_start_is_read_behind_the_contexts_alone", "two_subjects_at_the_start_do_not_share_a_key"],
        "value": ["a_subject_at_the_first_token_is_optimised_behind_contexts_alone"],
    },
    "a start-of-text token": {
        "fact_locate": ["a_start_token_shifts_the_place_and_not_the_token", "special_tokens_are_no_part_of_a_target"],
        "measures": ["a_prompt_begins_and_does_not_end_with_special_tokens"],
    },
    "batches with padding": {
        "keys": ["keys_of_a_batch_are_those_of_each_whole_text_alone", "the_padding_of_the_tokenizer_does_not_matter"],
        "covariance": ["a_massive_first_token_does_not_reach_the_sums_and_padding_may_be_anything"],
    },
    "targets of several tokens, one beginning like another": {
        "value": ["every_token_of_a_target_counts"],
        "measures": ["answers_are_those_of_whole_passes", "answers_that_begin_alike_are_read_in_one_row"],
    },
    "a target that the model says already": {"editors": ["what_the_model_says_already_is_reported_and_not_written"]},
    "two facts of one subject, two targets of one prompt": {
        "editors": ["facts_that_share_a_key_are_an_error_or_a_warning_that_names_both", "two_targets_of_one_prompt_are_a_conflict"]
    },
    "one fact edited twice": {
        "sequence": ["the_last_edit_of_a_fact_wins"],
        "edited_weights": ["of_two_edits_of_one_fact_the_first_can_be_taken_out_alone"],
    },
    "tied embeddings": {
        "editors": ["embeddings_that_are_tied_stay_as_they_are"],
        "edited_map": ["a_weight_that_several_blocks_use_is_refused"],
    },
    "halves, and quantised bases": {
        "value": ["half_precision_is_optimised_in_single"],
        "edited_weights": ["half_precision_is_rounded_once_and_says_what_that_costs"],
        "edit_adapter": ["a_quantised_model_gets_its_edit_as_an_adapter"],
    },
    "fused gates, Conv1D, biases, parallel blocks, norms behind the MLP": {
        "edited_map": ["a_change_along_a_key_shifts_what_the_map_gives_by_the_value_at_that_key_alone"],
        "editors": ["a_fact_is_written_where_it_was_asked_for_and_nothing_else_changes"],
        "value": ["a_clamp_of_the_block_is_in_the_units_before_a_post_norm"],
    },
    "grouped queries and sliding windows": {
        "value": ["the_rest_of_the_texts_gives_predictions_and_gradients_of_whole_texts"],
        "tracing": ["fast_passes_give_what_whole_passes_give"],
    },
    "mixtures of experts": {"edited_map": ["a_mixture_of_experts_is_refused_by_its_name"]},
    "chat templates": {
        "fact_locate": ["a_rendered_chat_gets_no_second_start_token_and_its_subject_is_found"],
        "measures": ["answers_of_a_chat_are_what_the_assistant_says"],
        "traps": ["a_fact_of_a_rendered_chat_is_edited_there"],
    },
    "a covariance of something else": {
        "covariance": [
            "another_model_is_seen",
            "trained_weights_are_seen",
            "another_tokenizer_is_seen",
            "a_layer_that_was_not_fitted_is_named",
        ]
    },
    "too few tokens, and massive keys": {
        "covariance": [
            "fewer_tokens_than_neurons_are_refused",
            "a_covariance_without_keys_or_rank_is_refused_with_its_rank",
            "massive_keys_are_left_out_where_the_first_token_has_one",
        ]
    },
    "an error, an interrupt, or want of memory in between": {
        "editors": ["an_error_in_the_middle_leaves_nothing_on_the_model"],
        "edited_weights": ["an_interrupt_at_any_line_leaves_the_old_weights_or_the_new_ones"],
        "traps": ["an_edit_goes_on_in_halves_where_memory_runs_out"],
    },
    "edits applied and reverted in any order": {"edited_weights": ["any_sequence_leaves_what_remains_to_the_bit"]},
    "adapters of another base, and ranks beyond the matrix": {
        "edit_adapter": ["an_adapter_knows_the_weights_that_it_was_solved_for", "dense_deltas_and_large_ranks_are_refused"],
        "editors": ["an_edit_whose_rank_is_that_of_the_matrix_is_stored_densely"],
    },
    "compilation, checkpointing, offloading, adapters on the edited map": {
        "value": ["checkpointing_and_compilation_change_nothing"],
        "edited_map": ["an_offloaded_weight_is_refused"],
        "keys": ["under_an_adapter_the_key_is_what_the_base_layer_takes"],
    },
    "contexts with braces, or with the target": {
        "contexts": ["braces_and_line_breaks_are_taken_out", "a_context_with_a_word_to_avoid_is_drawn_again"],
        "traps": ["the_contexts_of_an_edit_are_kept_with_it_and_do_not_say_its_target"],
    },
    "an optimiser that overshoots, and numbers that are none": {
        "value": ["the_best_delta_is_kept_where_the_loss_rises_again", "numbers_that_are_not_finite_are_an_error_that_names_the_fact"]
    },
}


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_has_a_test(trap):
    for name, tests in TRAPS[trap].items():
        text = Path(__file__).with_name(f"test_{name}.py").read_text()
        assert [test for test in tests if f"def test_{test}(" not in text] == []


def test_there_are_twenty_four():
    assert len(TRAPS) == 24


def test_a_fact_of_a_rendered_chat_is_edited_there():
    model = model_of("llama")
    rendered = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "where is the red cat"}], tokenize=False, add_generation_prompt=True
    )
    fact = Fact(rendered, "red cat", "house")
    before = probabilities(model, [fact])
    with edit(model, [fact], EDITOR, contexts=Contexts(())).applied(model):
        assert probabilities(model, [fact]) > 1.5 * before


def test_an_edit_goes_on_in_halves_where_memory_runs_out(monkeypatch):
    model = model_of("llama")
    before, expected, solve = weights_of(model), edit(model, FACTS, EDITOR), ValueProblem.solve

    def small(self, rows, facts):
        if len(facts) > 1:
            raise torch.OutOfMemoryError
        return solve(self, rows, facts)

    monkeypatch.setattr(ValueProblem, "solve", small)
    found = edit(model, FACTS, EDITOR)
    torch.testing.assert_close(found.deltas[0].change(), expected.deltas[0].change(), atol=1e-3, rtol=1e-2)
    assert equal_weights(model, before)


def test_the_contexts_of_an_edit_are_kept_with_it_and_do_not_say_its_target(tmp_path):
    model, fact = model_of("llama"), FACTS[1]
    options = {"editor": EDITOR, "layers": [0], "covariance": covariance_of("llama"), "guards": Guards(drift=None)}
    made = edit_facts(model, TOKENIZER, fact, **options)
    made.save(tmp_path / "edit")
    kept = Contexts.from_json(type(made).load(tmp_path / "edit").contexts)
    assert len(kept.prefixes) == 5 and kept.seed == 0 and not any(holds(prefix, fact.target) for prefix in kept.prefixes)
    again = edit_facts(model, TOKENIZER, fact, contexts=kept, **options)
    assert again.digest == made.digest
