"""README.md: what it claims is proved by tests, which exist; what no test proves is worded as such."""

import ast
import re
from functools import cache

import pytest

from scripts.tools.repository import REPOSITORY

PAGE = " ".join((REPOSITORY / "README.md").read_text().split())
PROMISES = PAGE.partition("## What it promises ")[2].partition(" Not yet:")[0]
PROOFS: dict[str, tuple[str, ...]] = {
    "against the very same frozen base weights": ("e2e/test_site.py::test_the_trainer_has_no_base_of_its_own",),
    "keeps every version in a registry": (
        "server/registry/test_registry.py::test_versions_are_published_resolved_and_read_back",
    ),
    "without dropping a user's request": ("e2e/test_site.py::test_promotions_under_load_lose_and_mix_nothing",),
    "No training sample leaves its site": (
        "e2e/test_hostile.py::test_nothing_of_users_or_of_the_training_data_is_written_down_or_told",
        "hostile/centre/test_what_a_site_sees.py::test_a_site_is_sent_no_other_sites_update_counts_or_measurements",
    ),
    "umbel enters through its plugin entry points, no fork, no patch": (
        "serving/test_plugin.py::test_without_a_run_directory_sglang_stays_as_it_is",
        "serving/test_plugin.py::test_an_engine_without_a_hooks_target_does_not_start",
    ),
    "runs at one site alone, and needs no Flower": (
        "e2e/test_adapt.py::test_the_readmes_commands_reach_a_promoted_version_that_answers",
    ),
    "the same command goes on from there": (
        "umbel/cli/test_adapt.py::test_a_signal_ends_it_and_its_daemon_and_the_next_one_goes_on",
        "umbel/cli/test_adapt.py::test_killed_in_the_middle_its_daemon_ends_and_the_next_one_takes_the_round_up",
    ),
    "after some of them it says what would help": (
        "umbel/cli/test_adapt.py::test_versions_that_are_worse_go_and_it_says_what_would_help",
    ),
    "`flwr run` goes on from there": ("server/test_alone.py::test_a_federation_goes_on_from_its_registry",),
    "It runs as a real federation does, with TLS, keys and signatures": (
        "scripts/demo/test_main.py::test_it_is_secure_unless_it_is_told_not_to_be",
        "e2e/centre/test_secure.py::test_a_round_goes_over_all_of_it_and_its_version_is_signed",
    ),
    "Ctrl-C leaves nothing behind": (
        "scripts/demo/test_main.py::test_a_signal_ends_it_as_ctrl_c_does",
        "scripts/test_processes.py::test_what_left_its_parents_group_is_ended_too",
    ),
    "write a site file": ("e2e/test_readme_site.py::test_it_serves_and_trains_in_bfloat16",),
    'ends with "ok: …" or what will bite': (
        "umbel/cli/test_site.py::test_check_names_all_files_that_are_missing_at_once",
    ),
    "messages, prompt/completion, or Alpaca fields": ("client/data/test_examples.py::test_parses_every_kind",),
    "what carries a loss, what is refused and why": (
        "umbel/cli/test_data.py::test_for_people_what_carries_a_loss_is_marked",
        "umbel/cli/test_data.py::test_refused_lines_are_grouped_by_their_reason",
    ),
    "`umbel check` says so where the CPU has no instructions for it": (
        "umbel/site/test_slow_dtype.py::test_a_cpu_that_emulates_the_default_is_told_of_with_the_remedy",
    ),
    "with a client of OpenAI's API": (
        "e2e/test_clients.py::test_a_chat_and_its_second_turn",
        "e2e/test_clients.py::test_responses_and_their_second_turn",
    ),
    "says which one answered": ("e2e/test_served_tokens.py::test_greedy_tokens_equal_the_reference",),
    "a version that is live or previous": (
        "serving/test_aliases.py::test_a_name_that_is_not_listed_is_not_found_and_the_listed_ones_are_named",
    ),
    "any PEFT LoRA directory for this base is served as it is": (
        "interop/test_peft_import.py::test_the_same_logits_as_with_the_original",
        "e2e/test_tenants.py::test_each_adapter_answers_as_peft_does_with_it",
    ),
    "DoRA and the like refused by name": ("umbel/test_peft_import.py::test_settings_that_are_refused",),
    "another one in its place, without failing a request": (
        "client/versions/test_serve_only.py::test_another_one_takes_its_place_and_a_request_ends_as_it_began",
    ),
    "a second one on the same machine needs a `--port` of its own": (
        "client/flower/test_supernode.py::test_a_second_supernode_on_a_machine_is_told_to_take_another_port",
    ),
    "flower-supernode, kept at work": (
        "client/flower/test_supernode.py::test_one_that_waits_for_ever_is_started_anew_and_its_own_end_is_the_end",
    ),
    "a clean copy of what Flower ships": (
        "server/test_bundle.py::test_flower_builds_the_exported_app_and_it_holds_no_site_file",
    ),
    "who is in it, who is not and why, how exact it is": (
        "umbel/cli/test_adapter.py::test_ls_and_show_print_what_is_there",
    ),
    "is every byte the one that was published?": (
        "server/registry/test_version_dir.py::test_one_flipped_bit_in_any_region_of_any_file_is_found_and_named",
    ),
    "back to what answered before, now": ("e2e/test_site.py::test_roll_back_and_forth",),
    "# all sites": ("e2e/test_fleet.py::test_the_fleet_follows_the_registry_and_every_sites_own_word",),
    "copies it out, with a model card": (
        "server/registry/peft/test_export.py::test_an_export_is_whole_and_its_card_names_sites_reasons_and_errors",
    ),
    "`peft` and SGLang load it as it is": (
        "interop/test_peft_export.py::test_peft_loads_the_export_and_the_version_in_the_registry",
        "e2e/test_export_served.py::test_greedy_tokens_equal_the_reference",
    ),
    "vLLM reads this format by its documentation; no test runs it": (),
    "or a class of your own in some twenty lines": (
        "strategies/test_strategy.py::test_the_pages_own_strategy_runs_and_has_at_most_twenty_lines",
    ),
    "and its like withstand hostile sites": (
        "strategies/test_robust.py::test_a_robust_rule_comes_near_the_honest_mean",
    ),
    "One base per site.": (
        "serving/cotrainer/test_base_view.py::test_the_trainers_frozen_parameters_are_still_the_served_ones",
        "e2e/test_site.py::test_the_trainer_has_no_base_of_its_own",
    ),
    "Serving never waits for training longer than one quantum": (
        "serving/cotrainer/test_cotrainer.py::test_no_hook_call_runs_more_than_one_quantum_while_a_request_waits",
        "e2e/test_site.py::test_training_while_serving_runs_one_quantum_at_a_time",
    ),
    "Training takes what the latency targets leave": (
        "serving/cotrainer/test_governor_properties.py::test_no_random_load_breaks_a_guarantee",
        "serving/cotrainer/test_governor.py::test_the_floor_breaks_the_targets_and_says_for_how_long",
    ),
    "A request is answered by one version": (
        "e2e/test_site.py::test_promotions_under_load_lose_and_mix_nothing",
        "serving/router/test_router.py::test_the_version_is_the_tables_whatever_the_body_asks_for",
    ),
    "A promotion is one assignment": (
        "e2e/test_kills.py::test_a_federation_outlives_every_kill",
        "recovery/site/test_recovery.py::test_a_site_that_dies_at_any_point_comes_back_whole_and_goes_on",
    ),
    "Nothing bad reaches the engine": (
        "e2e/test_site.py::test_bad_adapters_are_refused_and_serving_goes_on",
        "hostile/site/test_control.py::test_a_hostile_adapter_is_refused_and_not_stored",
    ),
    "Who said it is known": (
        "server/test_signing.py::test_every_version_is_signed_as_it_is_kept_and_as_it_is_sent",
        "server/test_orders.py::test_the_update_of_the_last_round_is_no_update_of_this_one",
    ),
    "One site cannot fail a round": (
        "hostile/centre/test_centre.py::test_a_hostile_update_is_left_out",
        "e2e/test_rounds.py::test_every_round_completes_with_the_honest_mean_and_names_who_is_not_in_it",
    ),
    "The mean is exact": (
        "strategies/test_exact.py::test_the_mean_is_exact_to_its_certificate_in_every_order_and_gauge",
        "strategies/test_certificate.py::test_the_certificate_is_the_dense_error_of_what_is_published",
        "server/test_memory.py::test_eighty_sites_take_no_more_memory_than_eight",
        "strategies/test_steps.py::test_a_site_that_is_stopped_at_half_its_steps_pulls_as_hard_as_the_other",
    ),
    "no GPU has run umbel yet": (
        "e2e/test_gpu_check.py::test_every_check_passes_on_a_device_that_lags",
        "serving/cotrainer/lanes/test_streams.py::test_a_stream_of_the_engines_is_never_trainings",
    ),
}
"""Words of the page → the tests that prove them; none where the page itself says that nothing does."""


@cache
def functions(file: str) -> frozenset[str]:
    text = (REPOSITORY / "tests" / file).read_text()
    return frozenset(one.name for one in ast.walk(ast.parse(text)) if isinstance(one, ast.FunctionDef))


@pytest.mark.parametrize("claim", PROOFS)
def test_a_claim_is_on_the_page_and_its_tests_exist(claim: str) -> None:
    assert claim in PAGE
    for test in PROOFS[claim]:
        file, _, name = test.partition("::")
        assert name in functions(file), test


def test_every_promise_has_a_proof() -> None:
    promises = re.findall(r"- \*\*(.+?)\*\*", PROMISES)
    assert len(promises) >= 9
    assert [promise for promise in promises if not PROOFS.get(promise)] == []


def test_every_program_that_loads_a_version_is_tested_or_said_not_to_be() -> None:
    said = re.findall(r"\bvLLM\b[^.]*\.", PAGE)
    assert said == ["vLLM reads this format by its documentation; no test runs it."]
