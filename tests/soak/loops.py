"""The loops of a soak: which test each one is, how many rounds make a slice and how many a complete
soak."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """A test whose rounds have numbers (`tests/soak/counts.py`).

    test     file, or file::test, below `tests/`
    slice    rounds that pytest runs at a time, a minute or two
    target   rounds of a complete soak
    """

    test: str
    slice: int
    target: int


def whole(test: str) -> Loop:
    """Returns a loop over a short list of cases that runs as one slice."""
    return Loop(test, 1_000_000, 1_000_000)


KILLS, FILES = "soak/failures/test_kills.py", "soak/inputs/test_strangers_files.py"
FAMILIES = "soak/models/test_families.py"
GRAMMARS = "decoding/sampling/test_grammar.py"

LOOPS = {
    "kills": Loop(
        f"{KILLS}::test_a_run_that_is_killed_and_resumed_is_the_run_that_never_was", 5, 200
    ),
    "kills_of_others": Loop(
        f"{KILLS}::test_a_command_that_is_killed_and_given_again_leaves_what_it_should", 7, 100
    ),
    "kills_of_fleets": Loop(
        f"{KILLS}::test_a_fleet_that_is_killed_goes_on_as_the_fleet_that_never_was", 5, 100
    ),
    "resumes": Loop("soak/failures/test_resumes.py", 10, 200),
    "writes": Loop("soak/failures/test_failing_writes.py", 36, 300),
    "slow_writes": Loop("soak/failures/test_failing_writes.py", 6, 60),
    "inputs": Loop("soak/inputs/test_inputs.py", 1000, 200_000),
    "settings": Loop(
        f"{FILES}::test_settings_of_any_kind_and_size_are_read_or_refused", 500, 20_000
    ),
    "headers": Loop(
        f"{FILES}::test_weight_files_with_spoiled_headers_are_read_or_refused", 500, 20_000
    ),
    "states": Loop(
        f"{FILES}::test_states_of_packed_weights_of_any_kind_are_read_or_refused", 500, 10_000
    ),
    "packed": Loop(f"{FILES}::test_folders_that_others_packed_are_read_or_refused", 300, 10_000),
    "gguf": Loop(f"{FILES}::test_spoiled_gguf_headers_are_read_or_refused", 3000, 40_000),
    "gguf_bases": Loop(f"{FILES}::test_spoiled_gguf_files_become_a_base_or_an_error", 200, 3000),
    "calls": Loop(
        "kernels/bindings/test_native_calls.py::test_spoiled_calls_are_refused_or_stay_within_their_tensors",
        3000,
        20_000,
    ),
    "requests": Loop("soak/serve/test_requests.py", 1000, 10_000),
    "linear": Loop("soak/serve/test_linear.py", 60, 400),
    "growth": Loop(
        "soak/serve/test_growth.py::test_time_and_memory_for_a_dimension_grow_in_proportion_to_it",
        60,
        900,
    ),
    "clients": Loop("soak/serve/test_clients.py", 60, 1000),
    "cycles": Loop("soak/serve/test_cycles.py", 300, 1000),
    "mixes": Loop("soak/models/test_mixes.py", 100, 10_000),
    "engine": Loop("soak/decoding/test_engine_mixes.py", 250, 10_000),
    "decoding": Loop("soak/decoding/test_decoding.py", 200, 5000),
    "tiers": Loop(
        "library/test_residents.py::test_any_traffic_ends_each_request_once_and_within_the_budget",
        20,
        200,
    ),
    "unloads": Loop(
        "library/test_residents.py::test_what_is_unloaded_leaves_nothing_behind_however_often",
        500,
        1000,
    ),
    "exchanges": Loop("library/test_residents.py", 60, 300),
    "schemas": Loop(
        f"{GRAMMARS}::test_a_sampled_answer_is_json_of_its_schema_unless_it_was_cut", 1000, 5000
    ),
    "families": Loop(
        f"{FAMILIES}::test_every_family_agrees_with_transformers_and_peft_or_says_why_not", 6, 300
    ),
    "config_fields": Loop("soak/models/test_config_fields.py", 2, 300),
    "hybrids": whole(FAMILIES),
    "accelerator": Loop("soak/models/test_accelerator_cells.py", 40, 10_000),
    "methods": whole("adapters/test_methods.py"),
    "processes": whole("processes/test_processes.py"),
    "standing": whole("processes/test_processes.py"),
    "shards": whole("processes/test_shards.py"),
    "recipes": whole("soak/cluster/test_recipes.py"),
    "ray": Loop("soak/cluster/test_ray_compare.py soak/cluster/test_ray_serve.py", 1, 3),
    "stranger": Loop("soak/test_stranger.py", 1, 1),
}
