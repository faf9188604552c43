"""Do the tests notice? Small changes of central lines, one at a time, in a copy: each should fail a
test of its module.

    python tests/mutations.py
        150 mutations drawn by seed; the report as a table and as JSON
    python tests/mutations.py --number 40 --only training/ --out found.json

A mutation is one edit of the text: another comparison, operator or constant, a negated condition, a
statement left out, two arguments exchanged. Drawn from the functions of the modules below;
annotations, messages, asserts and constants of a module (sizes that change speed alone) are left
out. First run those tests of a module that call the changed function, then those of others that do
(callers.py; `--callers FILE` keeps which these are, an empty one asks all of a module's), the
shortest first and some twenty seconds of either; for C all tests of the module; what then survives
is asked of all other files that import the module. What tests call is seen by watching them: those
named beside the modules drawn, or all with `--all-callers`. A survivor is to be read: a missing
test, or a change that means the same. Not part of `make test`: it takes an hour.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHED_CC = ROOT / "tests" / "support" / "kernels" / "cached_cc.sh"
sys.path.insert(0, str(ROOT))  # as a script
from tests.callers import Callers, Calls  # noqa: E402

TESTS: dict[str, tuple[str, ...]] = {
    "kernels/attention/packed.py": ("kernels/test_references.py",),
    "kernels/attention/compiled.py": ("kernels/attention/test_attention_native.py",),
    "kernels/layout.py": (
        "kernels/test_references.py",
        "models/test_step.py",
        "adapters/placement/test_masks.py",
    ),
    "kernels/dense/lora.py": (
        "kernels/test_references.py",
        "kernels/layers/test_block.py",
        "adapters/placement/test_masks.py",
    ),
    "kernels/dense/dora.py": ("adapters/methods/test_dora.py",),
    "kernels/dense/loss.py": (
        "kernels/test_references.py",
        "kernels/dense/test_fused.py",
        "kernels/bindings/test_roads.py",
        "models/test_step.py",
        "adapters/methods/test_new_tokens.py",
    ),
    "kernels/dense/dropout.py": (
        "kernels/test_references.py",
        "kernels/bindings/test_native.py",
        "kernels/bindings/test_roads.py",
    ),
    "kernels/dense/rank.py": ("kernels/dense/test_rank.py",),
    "kernels/dense/segments.py": ("kernels/dense/test_segments.py",),
    "kernels/dense/few_rows.py": (
        "kernels/dense/test_few_rows.py",
        "kernels/bindings/test_roads.py",
    ),
    "kernels/dense/divergence.py": ("objectives/test_distil.py",),
    "kernels/dense/row_updates.py": ("kernels/dense/test_segments.py",),
    "kernels/dense/products.py": ("kernels/dense/test_products.py", "plan/test_dry_run.py"),
    "kernels/attention/paged.py": ("kernels/attention/test_paged_attention.py",),
    "kernels/packed/nf4_reference.py": ("quant/test_nf4.py",),
    "quant/nf4.py": ("quant/test_nf4.py", "quant/test_files.py"),
    "quant/matrix.py": ("quant/test_methods.py",),
    "adapters/methods/lora.py": ("adapters/test_methods.py", "adapters/placement/test_attach.py"),
    "adapters/methods/low_rank.py": (
        "adapters/placement/test_attach.py",
        "adapters/test_methods.py",
    ),
    "adapters/methods/dora.py": ("adapters/methods/test_dora.py", "adapters/test_methods.py"),
    "adapters/methods/bottleneck.py": (
        "adapters/methods/test_bottleneck.py",
        "adapters/test_methods.py",
    ),
    "adapters/methods/prefix.py": ("adapters/methods/test_prefix.py", "adapters/test_methods.py"),
    "adapters/placement/acting.py": (
        "adapters/placement/test_routing.py",
        "adapters/placement/test_masks.py",
        "adapters/test_drawn.py",
    ),
    "adapters/placement/rows.py": (
        "kernels/dense/test_segments.py",
        "adapters/placement/test_masks.py",
        "soak/models/test_mixes.py",
    ),
    "adapters/combinations.py": ("adapters/test_combinations.py",),
    "adapters/placement/routing.py": (
        "adapters/placement/test_routing.py",
        "adapters/placement/test_attach.py",
        "adapters/placement/test_swap.py",
    ),
    "adapters/methods/initial_factors.py": ("adapters/methods/test_starts.py",),
    "adapters/methods/targets.py": (
        "adapters/placement/test_attach.py",
        "adapters/methods/test_starts.py",
    ),
    "adapters/placement/wrapping.py": (
        "adapters/placement/test_attach.py",
        "adapters/methods/test_trained_modules.py",
        "adapters/placement/test_swap.py",
    ),
    "kernels/packed/nf4.py": ("quant/test_nf4.py", "kernels/bindings/test_roads.py"),
    "kernels/packed/gguf.py": ("kernels/packed/test_gguf.py", "kernels/bindings/test_roads.py"),
    "kernels/tape/step_tape.py": (
        "kernels/tape/test_recorded.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/tape/layer_tape.py": (
        "kernels/tape/test_layer_tape.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/attention/prefix.py": (
        "adapters/methods/test_prefix.py",
        "kernels/test_references.py",
    ),
    "kernels/layers/block.py": ("kernels/layers/test_block.py", "kernels/tape/test_layer_tape.py"),
    "kernels/layers/block_heads.py": ("kernels/layers/test_block.py",),
    "kernels/layers/block_operands.py": ("kernels/layers/test_block.py",),
    "kernels/layers/block_parts.py": ("kernels/layers/test_block.py",),
    "kernels/layers/block_passes.py": ("kernels/layers/test_block.py",),
    "kernels/bindings/block_calls.py": (
        "kernels/layers/test_block.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/head_calls.py": (
        "kernels/layers/test_block.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/rank_calls.py": (
        "kernels/dense/test_rank.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/row_calls.py": (
        "kernels/test_references.py",
        "kernels/dense/test_fused.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/attention_calls.py": (
        "kernels/attention/test_attention_native.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/checks.py": (
        "kernels/bindings/test_native_calls.py",
        "kernels/dense/test_few_rows.py",
    ),
    "kernels/bindings/declarations.py": (
        "kernels/bindings/test_native_calls.py",
        "kernels/tape/test_layer_tape.py",
    ),
    "kernels/bindings/dense_calls.py": (
        "kernels/dense/test_mixes.py",
        "kernels/dense/test_few_rows.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/packed_calls.py": (
        "quant/test_nf4.py",
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/paged_calls.py": (
        "kernels/attention/test_paged_attention.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/step_calls.py": (
        "decoding/test_direct.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/decoding/decoder_step.py": (
        "decoding/test_direct.py",
        "kernels/bindings/test_roads.py",
    ),
    "kernels/dense/mixes.py": ("kernels/dense/test_mixes.py", "kernels/tape/test_recorded.py"),
    "kernels/dense/frozen.py": (
        "kernels/test_references.py",
        "quant/test_methods.py",
        "kernels/layers/test_block.py",
    ),
    "kernels/attention/groups.py": (
        "kernels/attention/test_groups.py",
        "adapters/placement/test_masks.py",
        "kernels/dense/test_fused.py",
    ),
    "kernels/bindings/arguments.py": (
        "kernels/bindings/test_native_calls.py",
        "kernels/tape/test_layer_tape.py",
        "kernels/tape/test_recorded.py",
    ),
    "kernels/bindings/library.py": (
        "kernels/bindings/test_native.py",
        "kernels/dense/test_rank.py",
        "kernels/test_references.py",
        "plan/test_dry_run.py",
    ),
    "kernels/dense/fused.py": (
        "kernels/dense/test_fused.py",
        "kernels/layers/test_block.py",
        "kernels/bindings/test_roads.py",
    ),
    "execution/agreement.py": ("execution/test_agreement.py",),
    **dict.fromkeys(
        (
            "execution/facts/attention_facts.py",
            "execution/facts/part_facts.py",
            "execution/facts/small_modules.py",
        ),
        ("execution/test_decoder_layer.py", "kernels/dense/test_fused.py"),
    ),
    "execution/facts/decoder_layer.py": (
        "execution/test_decoder_layer.py",
        "kernels/dense/test_fused.py",
        "kernels/layers/test_block.py",
    ),
    "execution/stand_in.py": ("kernels/dense/test_fused.py",),
    "model_record.py": ("test_caches.py",),
    "execution/train_step.py": ("kernels/dense/test_fused.py", "kernels/layers/test_block.py"),
    "data/batching.py": (
        "data/test_load.py",
        "data/test_large.py",
        "models/test_step.py",
        "adapters/placement/test_masks.py",
    ),
    "data/checks/check.py": ("data/checks/test_check.py", "data/test_load.py"),
    "data/files/formats.py": ("data/files/test_formats.py",),
    "data/files/layouts.py": ("data/files/test_formats.py",),
    "data/split.py": ("data/test_load.py",),
    "data/mixture.py": (
        "data/test_sets.py",
        "data/files/test_set_sources.py",
        "data/files/test_columns.py",
        "data/test_data_commands.py",
    ),
    "data/files/columns.py": (
        "data/test_sets.py",
        "data/files/test_set_sources.py",
        "data/files/test_columns.py",
        "data/test_data_commands.py",
    ),
    "data/files/sources.py": (
        "data/files/test_sources.py",
        "data/test_sets.py",
        "data/files/test_set_sources.py",
        "data/files/test_columns.py",
        "data/test_data_commands.py",
    ),
    "data/files/places.py": (
        "data/test_sets.py",
        "data/files/test_set_sources.py",
        "data/files/test_columns.py",
        "data/test_data_commands.py",
        "data/files/test_sources.py",
    ),
    "data/files/writing.py": (
        "data/test_sets.py",
        "data/files/test_set_sources.py",
        "data/files/test_columns.py",
        "data/test_data_commands.py",
    ),
    "data/checks/near.py": ("data/checks/test_closer.py",),
    "data/checks/closer.py": ("data/checks/test_closer.py",),
    "data/template/tokens.py": (
        "data/template/test_template.py",
        "data/template/test_rendering.py",
        "data/template/test_template_answers.py",
    ),
    "decoding/schedule/blocks.py": (
        "decoding/schedule/test_blocks.py",
        "decoding/schedule/test_scheduler.py",
    ),
    "decoding/schedule/scheduler.py": ("decoding/schedule/test_scheduler.py",),
    "decoding/schedule/step_plan.py": (
        "decoding/schedule/test_scheduler.py",
        "decoding/schedule/test_prompt_scores.py",
    ),
    "decoding/schedule/sequence.py": ("decoding/schedule/test_scheduler.py",),
    "decoding/continued.py": ("models/test_step.py", "decoding/schedule/test_scheduler.py"),
    "decoding/schedule/adapters.py": (
        "decoding/schedule/test_adapters.py",
        "adapters/test_combinations.py",
        "decoding/test_mixed_decoding.py",
        "decoding/schedule/test_scheduler.py",
    ),
    "decoding/answers.py": ("decoding/test_decode.py",),
    "decoding/prompt_states.py": ("decoding/schedule/test_prompt_states.py",),
    "decoding/schedule/block_names.py": (
        "decoding/schedule/test_block_names.py",
        "decoding/schedule/test_blocks.py",
    ),
    "decoding/lanes.py": ("kernels/tape/test_recorded.py",),
    "execution/recorded.py": ("kernels/tape/test_recorded.py", "decoding/test_direct.py"),
    "execution/ends.py": ("kernels/tape/test_recorded.py", "decoding/test_direct.py"),
    "decoding/schedule/adapter_places.py": ("decoding/schedule/test_scheduler.py",),
    "decoding/rereading.py": ("decoding/test_generate.py", "decoding/test_decode.py"),
    "decoding/tool_calls/calls.py": ("serve/protocols/test_tools.py",),
    "decoding/tool_calls/forms.py": (
        "serve/protocols/test_tools.py",
        "decoding/sampling/test_grammar.py",
    ),
    "decoding/tool_calls/elements.py": (
        "serve/protocols/test_tools.py",
        "decoding/sampling/test_grammar.py",
    ),
    "decoding/replay.py": ("decoding/test_replay.py",),
    "decoding/proof.py": (
        "models/test_proof.py",
        "models/test_same_values.py",
        "decoding/test_decode.py",
    ),
    "decoding/sampling/sampling.py": ("decoding/sampling/test_sampling.py",),
    "decoding/draws.py": ("decoding/sampling/test_sampling.py",),
    "decoding/sampling/grammar.py": ("decoding/sampling/test_grammar.py",),
    "decoding/sampling/json_check.py": ("decoding/sampling/test_grammar.py",),
    "execution/decode_step.py": ("decoding/test_direct.py", "kernels/tape/test_recorded.py"),
    "execution/layer_step.py": ("decoding/test_direct.py", "decoding/test_family_steps.py"),
    "execution/facts/model_start.py": ("kernels/tape/test_recorded.py", "decoding/test_direct.py"),
    "execution/paged.py": ("decoding/test_engine.py",),
    "decoding/engine.py": ("decoding/test_forward.py", "decoding/test_engine.py"),
    "decoding/forward.py": (
        "decoding/test_graphs.py",
        "decoding/test_forward.py",
        "decoding/test_decode.py",
        "decoding/test_engine.py",
    ),
    "decoding/generate.py": ("decoding/test_decode.py",),
    "decoding/text.py": ("decoding/test_text.py",),
    "serve/protocols/body.py": ("serve/protocols/test_fields.py",),
    "serve/protocols/faults.py": ("serve/protocols/test_fields.py",),
    "serve/http/json_body.py": ("serve/protocols/test_fields.py", "serve/test_server.py"),
    "serve/protocols/sampling_body.py": ("serve/protocols/test_fields.py",),
    "serve/protocols/chunks.py": ("serve/protocols/test_answers.py", "serve/test_server.py"),
    "serve/protocols/chat.py": (
        "serve/protocols/test_fields.py",
        "serve/protocols/test_answers.py",
        "serve/test_server.py",
    ),
    "serve/protocols/messages.py": (
        "serve/protocols/test_fields.py",
        "serve/protocols/test_answers.py",
    ),
    "serve/protocols/responses.py": (
        "serve/protocols/test_fields.py",
        "serve/protocols/test_answers.py",
        "serve/test_server.py",
    ),
    "serve/protocols/response_output.py": (
        "serve/protocols/test_answers.py",
        "serve/test_server.py",
    ),
    "serve/protocols/completions.py": ("serve/protocols/test_fields.py", "serve/test_server.py"),
    "serve/protocols/answer_formats.py": ("serve/protocols/test_fields.py",),
    "serve/protocols/tools.py": ("serve/protocols/test_tools.py",),
    "decoding/tool_calls/call_style.py": ("serve/protocols/test_tools.py",),
    "serve/engine/grammars.py": (
        "serve/protocols/test_tools.py",
        "serve/protocols/test_answers.py",
    ),
    "serve/engine/generation.py": (
        "serve/test_server.py",
        "serve/engine/test_loop_threads.py",
        "serve/http/test_streams.py",
    ),
    "serve/http/exchange.py": (
        "serve/http/test_streams.py",
        "serve/http/test_connections.py",
        "serve/test_server.py",
    ),
    "serve/protocols/conversation.py": ("serve/protocols/test_fields.py",),
    "serve/protocols/classification.py": ("serve/test_classification.py",),
    "serve/protocols/request.py": (
        "serve/protocols/test_fields.py",
        "serve/protocols/test_answers.py",
        "serve/test_server.py",
    ),
    **dict.fromkeys(
        (
            "serve/engine/fine_tuning.py",
            "serve/http/fine_tuning.py",
            "serve/http/uploads.py",
            "serve/protocols/fine_tuning.py",
        ),
        ("serve/test_fine_tuning.py",),
    ),
    "serve/http/page.py": ("serve/http/test_page.py",),
    "serve/http/paths.py": ("serve/test_docs.py", "serve/test_server.py"),
    "serve/engine/chooser.py": ("serve/test_auto.py",),
    "serve/engine/classifier.py": ("serve/test_classification.py",),
    "serve/engine/nearness.py": ("serve/engine/test_nearness.py", "serve/test_auto.py"),
    "serve/refusals.py": (
        "serve/protocols/test_fields.py",
        "serve/engine/test_names.py",
        "serve/test_server.py",
    ),
    "serve/engine/service.py": (
        "serve/test_server.py",
        "serve/http/test_streams.py",
        "serve/engine/test_loop_threads.py",
    ),
    "serve/engine/prompts.py": (
        "serve/protocols/test_answers.py",
        "serve/test_server.py",
        "adapters/methods/test_new_tokens.py",
    ),
    "serve/engine/metrics.py": ("serve/test_server.py", "serve/http/test_streams.py"),
    "serve/http/details.py": ("serve/http/test_page.py", "serve/test_server.py"),
    "serve/engine/vllm_adapters.py": ("serve/test_server.py", "serve/engine/test_names.py"),
    "serve/http/app.py": ("serve/test_server.py", "serve/test_docs.py"),
    "serve/protocols/tokens.py": ("serve/test_server.py",),
    "serve/runs.py": ("serve/http/test_watching.py",),
    "jobs/store.py": ("jobs/test_store.py",),
    "jobs/suspension.py": ("jobs/test_suspension.py",),
    "serve/start.py": ("serve/engine/test_room.py", "serve/test_process.py"),
    "serve/http/guard.py": ("serve/http/test_guard.py",),
    "serve/http/keys.py": ("serve/http/test_guard.py",),
    "serve/engine/names.py": ("serve/engine/test_names.py", "serve/test_server.py"),
    "serve/protocols/answers.py": (
        "serve/protocols/test_answers.py",
        "serve/http/test_streams.py",
        "serve/test_server.py",
    ),
    "serve/engine/loop.py": (
        "serve/engine/test_loop_threads.py",
        "serve/http/test_streams.py",
        "serve/test_server.py",
    ),
    "serve/http/connection.py": ("serve/http/test_connections.py", "serve/http/test_streams.py"),
    "serve/http/open_files.py": ("serve/http/test_connections.py",),
    "serve/engine/token_text.py": (
        "serve/engine/test_token_text.py",
        "serve/engine/test_loop_threads.py",
        "adapters/methods/test_new_tokens.py",
    ),
    "decoding/guesses.py": ("decoding/schedule/test_lookup.py",),
    "decoding/schedule/guessed_spans.py": ("decoding/schedule/test_lookup.py",),
    "decoding/schedule/limits.py": (
        "decoding/schedule/test_scheduler.py",
        "decoding/test_engine.py",
    ),
    "decoding/schedule/lookup.py": ("decoding/schedule/test_lookup.py",),
    "decoding/schedule/queues.py": ("decoding/schedule/test_scheduler.py",),
    "execution/attention.py": (
        "execution/test_decoder_layer.py",
        "models/test_proof.py",
        "models/test_step.py",
        "adapters/methods/test_prefix.py",
    ),
    "execution/facts/layer_facts.py": (
        "execution/test_decoder_layer.py",
        "decoding/test_direct.py",
    ),
    "execution/facts/norm_places.py": ("execution/test_decoder_layer.py",),
    "execution/proofs/model.py": ("models/test_proof.py", "decoding/test_direct.py"),
    "execution/proofs/same_values.py": ("models/test_same_values.py",),
    "execution/proofs/small_copy.py": ("models/test_proof.py", "kernels/dense/test_fused.py"),
    "execution/proofs/steps.py": ("execution/test_decoder_layer.py", "decoding/test_direct.py"),
    "execution/proofs/structure.py": ("models/test_proof.py", "plan/test_remembered.py"),
    "execution/switches.py": ("models/test_proof.py",),
    "kernels/attention/flash.py": ("kernels/attention/test_flash.py",),
    "kernels/bindings/draw_calls.py": (
        "decoding/sampling/test_sampling.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/bindings/pages.py": ("bases/test_own_pages.py",),
    "kernels/dense/bundles.py": ("kernels/dense/test_segments.py",),
    "kernels/tape/tape.py": ("kernels/tape/test_layer_tape.py", "kernels/tape/test_recorded.py"),
    "models/checkpointing.py": ("models/test_step.py", "training/test_heap.py"),
    "serve/run.py": ("serve/test_process.py",),
    "library/residents/tiers.py": ("library/test_residents.py",),
    "library/residents/residents.py": ("library/test_residents.py",),
    "library/library.py": (
        "library/test_library.py",
        "library/test_incoming.py",
        "library/test_adapters_command.py",
        "library/test_shared.py",
    ),
    "library/index.py": (
        "library/test_library.py",
        "library/test_incoming.py",
        "library/test_adapters_command.py",
        "library/test_shared.py",
    ),
    "library/objects.py": (
        "library/test_library.py",
        "library/test_incoming.py",
        "library/test_adapters_command.py",
        "library/test_crash.py",
    ),
    "library/leftovers.py": (
        "library/test_library.py",
        "library/test_incoming.py",
        "library/test_adapters_command.py",
        "library/test_crash.py",
    ),
    "library/remote/transfer.py": ("library/test_remote.py",),
    "comparison/store.py": ("comparison/test_compare_store.py",),
    "models/likelihood.py": ("evaluation/test_run.py", "decoding/test_decode.py"),
    "bases/identity/fingerprint.py": ("bases/test_fingerprint.py",),
    "models/step.py": ("models/test_step.py",),
    "training/optimizer/buffer.py": ("training/test_optimizers.py", "training/test_loop.py"),
    "training/loop.py": (
        "training/test_loop.py",
        "training/joint/test_joint.py",
        "training/joint/test_joint_leaving.py",
    ),
    "training/trainee.py": ("training/test_loop.py", "training/test_run_folder.py"),
    "training/gradient.py": ("training/test_loop.py", "training/test_run_folder.py"),
    "training/held_out/evaluations.py": ("training/test_loop.py", "training/test_run_folder.py"),
    "training/held_out/best.py": ("training/test_loop.py", "training/test_run_folder.py"),
    "training/state/checkpoint.py": ("training/test_loop.py", "training/test_run_folder.py"),
    "training/optimizer/offload.py": ("training/test_offload.py",),
    "training/processes/assignment.py": ("processes/test_parts.py",),
    "training/processes/reduce.py": ("processes/test_parts.py",),
    "training/processes/world.py": ("processes/test_parts.py",),
    "training/state/parents.py": ("training/test_parents.py",),
    "training/output/records.py": ("training/test_records.py", "training/test_run_folder.py"),
    "training/held_out/losses.py": (
        "training/held_out/test_held_out.py",
        "training/test_loop.py",
        "data/test_sets.py",
        "data/files/test_set_sources.py",
        "data/files/test_columns.py",
        "data/test_data_commands.py",
    ),
    "training/supervisor.py": ("training/joint/test_halving.py",),
    **dict.fromkeys(
        (
            "training/own_loop/forward_queue.py",
            "training/own_loop/losses.py",
            "training/own_loop/trainer.py",
        ),
        ("training/test_own_loop.py", "training/test_own_loop_objectives.py"),
    ),
    **dict.fromkeys(
        ("training/own_loop/objectives.py", "training/own_loop/reference.py"),
        ("training/test_own_loop_objectives.py",),
    ),
    "objectives/preferences.py": ("objectives/test_preferences.py", "objectives/test_reference.py"),
    "training/held_out/reference.py": (
        "objectives/test_reference.py",
        "objectives/test_preferences.py",
    ),
    "data/mismatched.py": ("data/files/test_preferences.py",),
    "tuning/advice.py": ("tuning/test_tune.py",),
    **dict.fromkeys(
        ("tuning/candidates.py", "tuning/schedule.py", "tuning/verdict.py"),
        ("tuning/test_schedule.py",),
    ),
    "tuning/parts.py": ("tuning/test_parts.py",),
    **dict.fromkeys(
        ("tuning/judging.py", "tuning/supervisors.py", "tuning/tune.py"), ("tuning/test_tune.py",)
    ),
    "models/scores.py": ("models/test_scores.py",),
    "models/predictions.py": ("models/test_step.py", "objectives/test_preferences.py"),
    "evaluation/intervals.py": ("evaluation/test_intervals.py",),
    "evaluation/metrics/exact.py": ("evaluation/test_metrics.py",),
    "evaluation/metrics/json_fields.py": ("evaluation/test_metrics.py",),
    "evaluation/metrics/overlap.py": ("evaluation/test_metrics.py",),
    "evaluation/metrics/rouge.py": ("evaluation/test_metrics.py",),
    "evaluation/metrics/metric.py": ("evaluation/test_metrics.py", "evaluation/test_run.py"),
    "evaluation/predictions.py": ("evaluation/test_run.py",),
    "evaluation/labels.py": ("evaluation/test_run.py",),
    "evaluation/label_scores.py": ("evaluation/test_labels.py", "evaluation/test_run.py"),
    "evaluation/label_figures.py": ("evaluation/test_labels.py",),
    "evaluation/scores.py": ("evaluation/test_scores.py",),
    "merge/fold/fold.py": (
        "merge/test_merge.py",
        "merge/test_merge_losses.py",
        "merge/test_rounding.py",
    ),
    "merge/combine/low_rank.py": ("merge/test_combine.py",),
    "merge/combine/combine.py": ("merge/test_combine.py",),
    "merge/fold/rounding.py": (
        "merge/test_merge.py",
        "merge/test_merge_losses.py",
        "merge/test_rounding.py",
    ),
    "merge/fold/folder.py": (
        "merge/test_merge.py",
        "merge/test_merge_losses.py",
        "merge/test_rounding.py",
    ),
    "merge/combine/extract.py": ("merge/test_extract.py",),
    "merge/combine/low_rank_adapters.py": ("merge/test_combine.py", "merge/test_merge_methods.py"),
    "formats/peft/tensors.py": (
        "formats/test_peft.py",
        "formats/test_adapter.py",
        "formats/test_writing.py",
        "formats/test_reading.py",
    ),
    "formats/peft/fit_check.py": (
        "formats/test_adapter.py",
        "formats/test_writing.py",
        "formats/test_reading.py",
    ),
    "formats/same_base.py": ("formats/test_same_base.py",),
    "formats/manifest.py": (
        "formats/test_adapter.py",
        "formats/test_writing.py",
        "formats/test_reading.py",
    ),
    "formats/peft/matching.py": (
        "formats/test_peft.py",
        "formats/test_adapter.py",
        "formats/test_writing.py",
        "formats/test_reading.py",
    ),
    "files/strict_tensors.py": ("files/test_strict_tensors.py",),
    "formats/norms.py": ("formats/test_norms.py",),
    "formats/adapter.py": (
        "formats/test_adapter.py",
        "formats/test_writing.py",
        "formats/test_reading.py",
        "formats/test_peft.py",
    ),
    "formats/loading.py": (
        "formats/test_adapter.py",
        "formats/test_writing.py",
        "formats/test_reading.py",
        "formats/test_peft.py",
    ),
    "formats/peft/config.py": ("formats/test_peft_config.py", "formats/test_peft.py"),
    "formats/prefix.py": ("formats/test_prefix.py",),
    "kernels/native/attention/attention.c": (
        "kernels/attention/test_attention_native.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/attention/attention_sums.c": (
        "kernels/attention/test_attention_native.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/attention/attention_float_body.h": (
        "kernels/attention/test_attention_native.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/attention/attention_tiles.c": (
        "kernels/attention/test_attention_native.py",
        "kernels/test_tiles.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/attention/attention_tiles.h": (
        "kernels/attention/test_attention_native.py",
        "kernels/test_tiles.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/common/across.h": (
        "kernels/dense/test_few_rows.py",
        "kernels/packed/test_gguf.py",
    ),
    "kernels/native/common/bf16.h": ("kernels/dense/test_few_rows.py", "quant/test_nf4.py"),
    "kernels/native/common/float_vectors.h": (
        "kernels/dense/test_fused.py",
        "kernels/attention/test_attention_native.py",
    ),
    "kernels/native/dense/factors.h": (
        "kernels/dense/test_mixes.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/few_rows.h": (
        "kernels/dense/test_few_rows.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_codes.h": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_format.h": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_rows.h": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/packed_rows.c": ("kernels/packed/test_gguf.py", "quant/test_nf4.py"),
    "kernels/native/nf4/nf4.h": ("quant/test_nf4.py", "kernels/bindings/test_native_calls.py"),
    "kernels/native/attention/attention.h": (
        "kernels/attention/test_attention_native.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/few_rows.c": (
        "kernels/dense/test_few_rows.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/few_rows_body.h": (
        "kernels/dense/test_few_rows.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/products.c": (
        "kernels/dense/test_products.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/attention/paged_attention.c": (
        "kernels/attention/test_paged_attention.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/attention/paged_attention_rows.h": (
        "kernels/attention/test_paged_attention.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/draw.c": (
        "decoding/sampling/test_sampling.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/decoder_step.c": (
        "decoding/test_direct.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/rank.c": (
        "kernels/dense/test_rank.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/dropout.c": (
        "kernels/bindings/test_native.py",
        "kernels/test_references.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/fused.c": (
        "kernels/dense/test_fused.py",
        "kernels/test_references.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/fused.h": (
        "kernels/dense/test_fused.py",
        "kernels/test_references.py",
        "kernels/layers/test_block.py",
    ),
    "kernels/native/layers/fused_float_body.h": (
        "kernels/dense/test_fused.py",
        "kernels/test_references.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/block.c": (
        "kernels/layers/test_block.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/layers/rank.h": ("kernels/dense/test_rank.py", "kernels/layers/test_block.py"),
    "kernels/native/common/tape.c": (
        "kernels/tape/test_recorded.py",
        "kernels/tape/test_layer_tape.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/updates.c": (
        "kernels/dense/test_mixes.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/updates_body.h": (
        "kernels/dense/test_mixes.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/dense/factors.c": (
        "kernels/dense/test_mixes.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/common/parallel.c": (
        "kernels/bindings/test_native.py",
        "kernels/tape/test_recorded.py",
        "kernels/dense/test_few_rows.py",
    ),
    "kernels/native/gguf/gguf.c": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_unpack.h": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_vectors.c": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_pairs.h": (
        "kernels/packed/test_gguf.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_floats.c": (
        "kernels/packed/test_gguf.py",
        "kernels/tape/test_recorded.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/gguf/gguf_floats_body.h": (
        "kernels/packed/test_gguf.py",
        "kernels/tape/test_recorded.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/nf4/nf4_dequantize.c": (
        "quant/test_nf4.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/nf4/nf4_quantize.c": (
        "quant/test_nf4.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/nf4/nf4_product.c": (
        "quant/test_nf4.py",
        "kernels/bindings/test_native_calls.py",
    ),
    "kernels/native/nf4/nf4_product_bf16.c": (
        "quant/test_nf4.py",
        "kernels/bindings/test_native_calls.py",
    ),
}
"""Central modules, and the test files that should notice a change in each."""

SECONDS, SECONDS_WAITED = 300, 900
"""A test that has computed or waited for as long hangs: the change was noticed. Others may be at
work here too."""
SECONDS_OF_CALLERS, SECONDS_WATCHED = 20, 90
"""Of tests that call a function; and of a test file, watched for what it calls. All but the waiting
is computing."""
COMPARISONS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
}
OPERATORS = {
    "+": "-",
    "-": "+",
    "*": "/",
    "/": "*",
    "//": "*",
    "%": "*",
    "**": "*",
    "&": "|",
    "|": "&",
    "@": "*",
}
SYMMETRIC = {"max", "min", "maximum", "minimum", "equal", "intersect1d"}
"""Functions to which the order of two arguments is nothing."""
LEFT_OUT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutation:
    """One edit: bytes start to end of the file become `after`."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    function: str = ""
    """Its qualified name, in Python."""

    def of(self, text: bytes) -> bytes:
        return text[: self.start] + self.after.encode() + text[self.end :]

    def __str__(self) -> str:
        short = " ".join(self.before.split())
        return (
            f"{self.file}:{self.line} {self.kind}: {short[:60]} ->"
            f" {' '.join(self.after.split())[:60] or 'nothing'}"
        )


class _Python(ast.NodeVisitor):
    """Every mutation within the functions of one file."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text, self.found = file, text, []  # type: tuple[str, str, list[Mutation]]
        self.data = text.encode()
        self.lines = [0]
        for line in self.data.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.names: list[str] = []
        self.in_function = False
        self.visit(ast.parse(text))

    def place(self, node: ast.AST) -> tuple[int, int]:
        """Bytes of a node in the file."""
        start = self.lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def add(self, node: ast.AST, kind: str, start: int, end: int, after: str) -> None:
        if self.in_function:
            before = self.data[start:end].decode()
            line: int = node.lineno  # type: ignore[attr-defined]
            function = ".".join(self.names).removesuffix(".<locals>")
            self.found.append(Mutation(self.file, line, kind, start, end, before, after, function))

    def between(
        self, node: ast.AST, left: ast.AST, right: ast.AST, kind: str, table: dict[str, str]
    ) -> None:
        """The operator that stands between two operands."""
        start, end = self.place(left)[1], self.place(right)[0]
        gap = self.data[start:end].decode()
        for symbol in sorted(table, key=len, reverse=True):
            if (at := gap.find(symbol)) >= 0:
                self.add(node, kind, start + at, start + at + len(symbol), table[symbol])
                return

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, LEFT_OUT):
            return
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            start, end = self.place(node.test)
            self.add(node, "condition", start, end, f"not ({self.data[start:end].decode()})")
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, self.in_function = self.in_function, True
        self.names += [node.name, "<locals>"]
        for child in node.body:
            self.visit(child)
        del self.names[-2:]
        self.in_function = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right in itertools.pairwise(operands):
            self.between(node, left, right, "comparison", COMPARISONS)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.between(node, node.left, node.right, "operator", OPERATORS)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.between(node, node.values[0], node.values[1], "and, or", {"and": "or", "or": "and"})
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            start, end = self.place(node)
            self.add(node, "sign", start, end, self.data[slice(*self.place(node.operand))].decode())
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.place(node)
        if isinstance(node.value, bool):
            self.add(node, "constant", start, end, str(not node.value))
        elif isinstance(node.value, int):
            self.add(node, "constant", start, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, "constant", start, end, repr(node.value * 2 if node.value else 1.0))

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip: guards what cannot happen
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            self.add(node, "left out", *self.place(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "left out", *self.place(node), "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        simple = [a for a in node.args if isinstance(a, ast.Name | ast.Attribute)]
        named = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if (
            named not in SYMMETRIC
            and len(node.args) >= 2
            and simple[:2] == node.args[:2]
            and ast.dump(simple[0]) != ast.dump(simple[1])
        ):
            (start, middle), (after, end) = self.place(simple[0]), self.place(simple[1])
            one, gap, other = (
                self.data[a:b].decode() for a, b in ((start, middle), (middle, after), (after, end))
            )
            self.add(node, "exchanged", start, end, other + gap + one)
        self.generic_visit(node)


def of_c(file: str, text: str) -> Iterator[Mutation]:
    """Mutations of C, by its text: comparisons, signs with spaces around them, small numbers;
    comments left out."""
    bare = re.sub(
        r"/\*.*?\*/|//[^\n]*|\"[^\"\n]*\"|^#[^\n]*",
        lambda m: " " * len(m.group()),
        text,
        flags=re.S | re.M,
    )
    assert text.isascii()  # places are in bytes
    grain = r"veneer_parallel\(.*,(?P<out>[^,]*)\);"  # items that a thread takes at least
    smaller_or_larger = (
        r"((?!\d)[\w.>-]+(?: - \w+)?)(?P<out> [<>] )(-?[\w.]+) \? (?:\1 : \3|\3 : \1)\b"
    )
    for match in [*re.finditer(grain, bare), *re.finditer(smaller_or_larger, bare)]:
        start, end = match.span("out")
        bare = bare[:start] + " " * (end - start) + bare[end:]

    def line(match: re.Match[str]) -> int:
        return text.count("\n", 0, match.start()) + 1

    swaps = {
        " < ": " <= ",
        " <= ": " < ",
        " > ": " >= ",
        " >= ": " > ",
        " == ": " != ",
        " + ": " - ",
        " - ": " + ",
        " * ": " + ",
        " += ": " -= ",
        " && ": " || ",
        " / ": " * ",
        " >> ": " << ",
    }
    for before, after in swaps.items():
        for match in re.finditer(re.escape(before), bare):
            yield Mutation(file, line(match), "operator", *match.span(), before, after)
    for match in re.finditer(r"(?<![\w.])[1-9]\d?(?![\w.])", bare):
        number = str(int(match.group()) + 1)
        yield Mutation(file, line(match), "constant", *match.span(), match.group(), number)


def all_mutations(source: Path, only: str) -> dict[str, list[Mutation]]:
    found = {}
    for file in TESTS:
        if re.search(only, file):
            text = (source / file).read_text(encoding="utf-8")
            found[file] = (
                list(of_c(file, text)) if not file.endswith(".py") else _Python(file, text).found
            )
    return found


def chosen(found: dict[str, list[Mutation]], number: int, seed: int) -> list[Mutation]:
    """The files in turn, each mutation of a file as likely as any other of it."""
    randoms = random.Random(seed)
    order = {file: randoms.sample(all_of_it, len(all_of_it)) for file, all_of_it in found.items()}
    taken: list[Mutation] = []
    while len(taken) < number and any(order.values()):
        for file in randoms.sample(sorted(order), len(order)):
            if order[file] and len(taken) < number:
                taken.append(order[file].pop())
    return taken


class Copy:
    """The project in a folder of its own; what is mutated there is put back."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        skip = shutil.ignore_patterns("__pycache__", "*.o", "build")
        for name in ("src", "tests", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / name)
        self.libraries = {
            path: path.read_bytes() for path in (folder / "src/veneer/kernels").glob("_native*.so")
        }
        self.sound: set[str] = set()  # tests that are known to pass without a mutation
        self.callers = Callers([])

    def with_callers(self, file: Path, names: Iterable[str]) -> None:
        """Which tests of the named files call what; they run once for it, unless the file says it
        already."""
        if not file.exists():
            for name in names:
                calls = Calls(file.absolute(), self.root / "src" / "veneer")
                self.tested([f"tests/{name}"], calls, seconds=SECONDS_WATCHED)
                print(f"     {name} was watched", flush=True)
        self.callers = Callers(file.read_text().splitlines() if file.exists() else [])

    def tried(self, mutation: Mutation) -> tuple[bool | None, str]:
        """(whether the tests pass all the same, what noticed the change); None: they do not pass
        without it."""
        path = self.root / "src" / "veneer" / mutation.file
        own = path.read_bytes()
        path.write_bytes(mutation.of(own))
        try:
            if not mutation.file.endswith(".py") and not self.built():
                return False, "does not compile"
            files = [f"tests/{name}" for name in TESTS[mutation.file]]
            near, far = self.callers.of(
                f"{mutation.file}:{mutation.function}", files, SECONDS_OF_CALLERS
            )
            for tests in filter(None, (near or files, far)):
                passed, by = self.tested(tests)
                if not passed:
                    break
            else:
                passed, by = self.asked_further(mutation.file, files)
        finally:
            path.write_bytes(own)
            for path, library in self.libraries.items():
                path.write_bytes(library)
        if not passed and "::" in by and by not in self.sound:
            if not self.tested([by])[0]:
                return None, f"{by} fails without any mutation"
            self.sound.add(by)
        return passed, by

    def asked_further(self, file: str, asked: Sequence[str]) -> tuple[bool, str]:
        """Asks the other test files that import a survivor's module: each whole, as far as it
        comes in its time."""
        room, _, stem = file.removesuffix(".py").replace("/", ".").rpartition(".")
        module = re.compile(
            rf"\bveneer\.{room}\.{stem}\b|\bfrom veneer\.{room} import .*\b{stem}\b"
        )
        for path in sorted(
            (self.root / "tests").rglob("test_*.py"), key=lambda path: path.stat().st_size
        ):
            name = str(path.relative_to(self.root))
            others = name not in asked and not name.startswith("tests/soak/")
            if others and module.search(path.read_text(encoding="utf-8")):
                passed, by = self.tested([name], seconds=SECONDS_WATCHED)
                if not passed and not by.startswith("no end"):
                    return False, by
        return True, ""

    def built(self) -> bool:
        """Builds the library, and compiles only files whose preprocessed text is new. Returns False
        if a file does not compile."""
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        objects = str(self.root / "objects")
        environment = os.environ | {"CC": str(CACHED_CC), "OBJECT_CACHE": objects}
        done = subprocess.run(build, cwd=self.root, env=environment, capture_output=True)
        return done.returncode == 0

    def tested(
        self, tests: list[str], *plugins: object, seconds: float = SECONDS
    ) -> tuple[bool, str]:
        """Whether these pass, and the first that does not: in a fork, which has torch and
        transformers already."""
        log, end = self.root / "tests.log", time.monotonic() + SECONDS_WAITED
        if (child := os.fork()) == 0:
            resource.setrlimit(
                resource.RLIMIT_CPU, (int(seconds), int(seconds))
            )  # of each process of it
            self._run(tests, log, plugins)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False, f"no end after {SECONDS_WAITED} s"
            time.sleep(0.05)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False, f"no end after {seconds} s of computing"
        failed = re.search(
            r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", log.read_text(errors="replace"), re.M
        )
        code = os.waitstatus_to_exitcode(status)
        return code == 0, failed.group(1) if failed else f"exit code {code}"

    def _run(self, tests: list[str], log: Path, plugins: Sequence[object]) -> None:
        code = 1
        try:
            os.setsid()
            signal.signal(
                signal.SIGINT, signal.default_int_handler
            )  # ignored where a shell put us behind
            os.chdir(self.root)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            paths = [str(self.root / "src"), str(self.root)]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            sys.path[:] = [*paths, *(path for path in sys.path if not path.startswith(str(ROOT)))]
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]  # the copy's own
            import pytest

            flags = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *([] if plugins else ["-x"])]
            code = int(pytest.main([*flags, *tests], plugins=plugins))
        finally:
            sys.stdout.flush()
            os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        default="",
        help="expression for the modules to mutate, for instance training/ or py$",
    )
    parser.add_argument("--out", type=Path, default=Path("mutations.json"))
    parser.add_argument(
        "--callers", type=Path, help="which tests call what; made where it is not there"
    )
    parser.add_argument(
        "--all-callers", action="store_true", help="watch all tests for what they call"
    )
    parser.add_argument("--list", action="store_true", help="say which mutations would be tried")
    args = parser.parse_args()
    mutations = chosen(all_mutations(ROOT / "src" / "veneer", args.only), args.number, args.seed)
    if args.list:
        print(*mutations, sep="\n")
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import pytest  # noqa: F401  # what every fork then has: seconds of each
    import torch  # noqa: F401
    import transformers

    for name in (
        "AutoModelForCausalLM",
        "GenerationConfig",
        "LlamaForCausalLM",
        "PreTrainedTokenizerFast",
    ):
        getattr(transformers, name)  # loaded at their first use

    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        near = {
            name
            for mutation in mutations
            if mutation.file.endswith(".py")
            for name in TESTS[mutation.file]
        }
        every = {
            str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")
        }
        watched = (
            every - {name for name in every if name.startswith("soak/")}
            if args.all_callers
            else near
        )
        copy.with_callers(args.callers or Path(folder) / "callers.jsonl", sorted(watched))
        for number, mutation in enumerate(mutations, 1):
            passed, by = copy.tried(mutation)
            word = {True: "SURVIVED", False: "caught", None: "unknown"}[passed]
            results.append(
                {**asdict(mutation), "result": word.lower(), "by": None if passed else by}
            )
            print(f"{number:4} {word:8} {mutation}", flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    counts = {
        word: sum(result["result"] == word for result in results)
        for word in ("caught", "survived", "unknown")
    }
    print(
        "\n"
        + ", ".join(f"{count} {word}" for word, count in counts.items())
        + f"; {args.out} has all of it"
    )


if __name__ == "__main__":
    main()
