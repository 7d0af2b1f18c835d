"""Which products of cases run in part: the ordinary tests take some of each, the deep ones (`make explore`) take all.

Every rule, mode, door and policy takes part in several of these tests, each of which leaves other cases out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import pytest

__all__ = ["thin"]

ONE_IN = {
    "test_precision.py::test_one_example_stays_within_the_clip_norm": 3,
    "test_modes_by_policy.py::test_the_clipped_sum_is_the_reference": 2,
    "test_modes_by_policy.py::test_one_example_moves_the_sum_by_the_sensitivity_at_most": 2,
    "test_rules_reference.py::test_the_clipped_sum_is_the_reference": 2,
    "test_rules_scales.py::test_one_example_of_any_scale_stays_within_the_clip_norm": 2,
    "test_rules_sensitivity.py::test_one_example_moves_the_sum_by_the_clip_norm_at_most": 2,
    "test_rules_sensitivity.py::test_an_example_whose_gradient_is_not_finite_weighs_nothing": 2,
    "test_rules_in_graphs.py::test_every_rule_gives_the_sum_of_the_reference_in_a_graph": 2,
    "test_rules_in_graphs.py::test_every_policy_gives_the_sum_of_the_reference_in_a_graph": 2,
    "test_capture.py::test_the_batch_axis_is_never_guessed_from_a_coincidence": 2,
    "test_bounded.py::test_an_example_that_is_not_finite_in_one_layer_adds_nothing_to_any": 2,
    "test_bounded.py::test_one_example_more_moves_the_sum_by_at_most_the_clip_norm": 2,
    "test_modes.py::test_every_rule_gives_the_sum_of_the_reference": 2,
    "test_two_pass.py::test_every_rule_gives_the_sum_of_the_reference": 2,
    "test_doors.py::test_a_step_at_the_explicit_door": 2,
    "test_doors.py::test_sampled_batches_at_the_papers_door": 2,
    "test_virtual_steps.py::test_a_step_splits_its_batch": 2,
    "test_accounting_properties.py::test_edges_give_a_number_that_falls_as_delta_grows": 3,
    "test_accounting_calibration_search.py::test_each_number_takes_few_questions": 2,
    "test_huggingface_trainer.py::test_a_resumed_run_has_the_epsilon_of_the_unbroken_one": 4,
    "test_huggingface_trainer.py::test_a_step_is_the_clipped_sum_of_a_loop_by_hand": 2,
    "test_interrupted_steps.py::test_after_an_interrupt_the_next_step_is_right": 2,
    "test_interrupts.py::test_the_step_after_an_interrupt_anywhere_is_right": 2,
    "test_key.py::test_a_forked_run_draws_other_noise": 2,
    "test_mechanism.py::test_what_is_right_passes": 2,
    "test_virtual_steps.py::test_the_largest_size_that_fits_is_found_by_halving": 2,
    "test_virtual_steps.py::test_physical_batches_change_nothing": 2,
    "test_noise_scale.py::test_the_noise_and_its_divisor_are_as_scheduled": 2,
}
"""Of how many cases of a test one runs ordinarily."""


def thin(items: Iterable[pytest.Item]) -> None:
    """Marks as deep all but one in so many cases of each of these tests."""
    met: dict[str, int] = {}
    for item in items:
        file, _, rest = item.nodeid.rpartition("/")[2].partition("::")
        name = f"{file}::{rest.partition('[')[0]}"
        if name not in ONE_IN or item.get_closest_marker("deep") is not None:
            continue
        place = met[name] = met.get(name, zlib.crc32(name.encode()) % ONE_IN[name] - 1) + 1
        if place % ONE_IN[name]:
            item.add_marker(pytest.mark.deep)
