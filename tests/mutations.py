"""Breaks the code on purpose, place by place, and says which of the breaks the tests notice.

    python tests/mutations.py [--only=TEXT]

Each mutation is made in a copy of this tree, where the tests that should fail are run. The exit code is 0 if every one
is noticed. It takes about a quarter of a minute per mutation on two cores, so it is no part of the test suite, which
only checks that every mutation still fits the code (test_promises.py). Add a mutation for a promise that you add.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("armd_jax", "experiments", "launch", "tests", "pyproject.toml", "setup.py", "README.md", "requirements.txt")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A place to break.

    promise: what does not hold any more. file: in armd_jax. old, new: the text before, which the file has once, and
    after. tests: which of the tests must fail, as arguments of pytest, in tests.
    """

    promise: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    # --- sweeps -------------------------------------------------------------------------------------------------------
    Mutation(
        "a finished member is not trained with another config",
        "studies/plan.py",
        "if (trained or not may) and not _same_place",
        "if not may and not _same_place",
        "studies/test_plan.py::test_a_member_that_has_changed_is_refused",
    ),
    Mutation(
        "no process outlives a sweep",
        "studies/running.py",
        "self._prctl(_PR_SET_PDEATHSIG, _SAVE)",
        "self._prctl(_PR_SET_PDEATHSIG, 0)",
        "studies/test_running.py::test_a_process_does_not_outlive_the_sweep",
    ),
    Mutation(
        "a failed member stops nobody",
        "studies/running.py",
        "while self._slots and not self._asked and",
        "while self._slots and not self._asked and not any(one.error for one in self._states) and",
        "studies/test_running.py::test_a_failed_member_stops_nobody",
    ),
    Mutation(
        "processes at a time have as many cores each",
        "studies/running.py",
        "for at in range(size)} for slot",
        "for at in range(size + slot)} for slot",
        "studies/test_running.py::test_cores_are_shared_evenly",
    ),
    Mutation(
        "no two members have the same config",
        "sweeps.py",
        "if (other := same.setdefault(config, name)) != name:",
        "if (other := same.setdefault(config, name)) == '':",
        "test_sweeps.py::test_mistakes_are_one_line",
    ),
    # --- documents that are kept apart --------------------------------------------------------------------------------
    Mutation(
        "no query sees a key of another document",
        "core/kernels/attention.py",
        "seen & (index_T >= first_B1Q1)",
        "seen",
        "core/test_documents.py::test_a_row_of_documents_is_as_many_rows",
    ),
    Mutation(
        "chunks of keys before the document are not needed",
        "core/kernels/attention.py",
        "first_CBc.min(axis=(1, 2)) // chunk",
        "first_CBc.max(axis=(1, 2)) // chunk",
        "core/test_documents.py::test_a_row_of_documents_is_as_many_rows",
    ),
    Mutation(
        "a prefix sum begins with the document",
        "core/aggregation.py",
        "first_BG if rows.document_BN is None else rows.document_BN",
        "first_BG",
        "core/test_documents.py::test_a_row_of_documents_is_as_many_rows",
    ),
    Mutation(
        "the first token of a document has no neighbour in another",
        "core/rows.py",
        "jnp.where(rows.g_positions_BG - 1 == first_BN, START, rows.g_left_BG)",
        "rows.g_left_BG",
        "core/test_documents.py::test_a_row_of_documents_is_as_many_rows",
    ),
    Mutation(
        "positions begin anew in every document",
        "core/rows.py",
        "g_positions_BG=rows.g_positions_BG - first_BN",
        "g_positions_BG=rows.g_positions_BG",
        "core/test_documents.py::test_a_row_of_documents_is_as_many_rows",
    ),
    Mutation(
        "no block holds tokens of two documents",
        "core/documents.py",
        "differs(block_BN) | differs(own_BN)",
        "differs(block_BN)",
        "core/test_documents.py::test_orders_stay_inside_documents",
    ),
    Mutation(
        "validation keeps documents apart as training does",
        "training/step.py",
        "valid_BN, documents.of(config, tokens_BN))",
        "valid_BN, None)",
        "training/test_step.py::test_documents_are_kept_apart_in_training_and_validation",
    ),
    Mutation(
        "a run keeps the reset that it began with",
        "training/workdir.py",
        '_NOT_CONTENT = ("data.reset",)',
        "_NOT_CONTENT = ()",
        "training/test_workdir.py::test_every_field_is_decided",
    ),
    # --- the bill -----------------------------------------------------------------------------------------------------
    Mutation(
        "a conditional counts as the mean of its branches",
        "compilation/hlo.py",
        "return 1 / max(len(called(instruction)), 1)",
        "return 1",
        "compilation/test_hlo.py::test_a_conditional_is_the_mean_of_its_branches",
    ),
    Mutation(
        "loops of chunked attention count as often as they run",
        "compilation/attention.py",
        "return (chunks + 1) / 2 if config.model.has_orders else float(chunks)",
        "return 1.0",
        "compilation/test_attention.py::test_chunked_attention_counts_the_chunks_that_are_seen",
    ),
    Mutation(
        "the upper end of a bill is what real runs reach",
        "compilation/bill.py",
        "seconds = step_seconds, step_seconds / published.share",
        "seconds = step_seconds, step_seconds",
        "compilation/test_bill.py::test_the_whole_schedule",
    ),
    Mutation(
        "gradients of matrices are summed in float32 below bfloat16 activations",
        "training/placement.py",
        "return activation_dtype(config.model) != jnp.float32",
        "return False",
        "training/test_step.py::test_gradients_are_summed_in_the_dtype_of_the_config",
    ),
    # --- reports of sweeps --------------------------------------------------------------------------------------------
    Mutation(
        "a member that is not finished is in no mean",
        "report/sweep_reading.py",
        "return [member for member in self.of_row(row) if member.finished]",
        "return self.of_row(row)",
        "report/test_sweep_tables.py::test_what_is_not_finished_is_listed_and_in_no_mean",
    ),
    Mutation(
        "ratios are taken seed by seed",
        "report/sweep_statistics.py",
        "[values[seed] / base[seed] for seed in values if base.get(seed)]",
        "[value / other for value in values.values() for other in base.values() if other]",
        "report/test_sweep_tables.py::test_ratios_are_taken_seed_by_seed",
    ),
    Mutation(
        "losses are interpolated in the logarithm of the step",
        "report/sweep_statistics.py",
        "before[0] * (step / before[0]) ** part",
        "before[0] + (step - before[0]) * part",
        "report/test_sweep_tables.py::test_steps_to_equal_likelihood",
    ),
    Mutation(
        "speeds are in no table that is to be the same for equal runs",
        "report/sweep_figures.py",
        'or bool({"second", "seconds"} & set(name.split("_")))',
        "",
        "report/test_sweep_tables.py::test_csv_has_every_member_and_every_number",
    ),
    # --- where time goes ----------------------------------------------------------------------------------------------
    Mutation(
        "steps that were trained again are lost",
        "training/goodput.py",
        "                piece.lose_beyond(step)",
        "                pass",
        "training/test_goodput.py::test_seconds_add_up_to_the_wall_clock",
    ),
    Mutation(
        "an idle device is seen, and a busy one is not taken for idle",
        "training/run_log.py",
        "newest is None or newest.is_ready()",
        "newest is not None",
        "training/test_goodput.py::test_waits_are_fractions_of_the_time_between_rows",
    ),
    Mutation(
        "a trace is whole or absent",
        "training/profiling.py",
        "                        raise _NotWhole",
        "                        pass",
        "training/test_profiling.py::test_a_killed_profile_leaves_nothing",
    ),
    Mutation(
        "time inside an operation is counted once",
        "compilation/operations.py",
        "open_events[-1][2] -= duration",
        "pass",
        "compilation/test_operations.py::test_own_time_leaves_out_what_is_inside",
    ),
    # --- updates ------------------------------------------------------------------------------------------------------
    Mutation(
        "an exported sampler draws nothing behind an end in one stream",
        "interop/stablehlo.py",
        "jnp.cumsum(is_end_BR, axis=1) > is_end_BR",
        "jnp.cumsum(is_end_BR, axis=1) < 0",
        "interop/test_stablehlo.py::test_programs_are_the_model",
    ),
    Mutation(
        "positions that a score adds to an order change none of the others",
        "interop/stablehlo.py",
        "block_BN[:, -1:] + 1 + index_W - length",
        "block_BN[:, -1:]",
        "interop/test_stablehlo.py::test_programs_are_the_model",
    ),
    Mutation(
        "an update whose gradient is not finite is not made",
        "training/step.py",
        "good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)",
        "good = jnp.isfinite(loss)",
        "training/test_faults.py::test_a_gradient_that_is_not_finite_is_no_update",
    ),
    Mutation(
        "every step has its own dropout",
        "training/step.py",
        "_key(config, _DROPOUT, step)",
        "_key(config, _DROPOUT, jnp.int32(0))",
        "training/test_train.py::test_every_step_and_microbatch_has_its_own_dropout",
    ),
    Mutation(
        "every microbatch has its own dropout",
        "training/step.py",
        "whole.fold_in(number)",
        "whole",
        "training/test_train.py::test_every_step_and_microbatch_has_its_own_dropout",
    ),
    Mutation(
        "every step draws another order",
        "training/step.py",
        "return _key(config, _TASK, jnp.asarray(step))",
        "return _key(config, _TASK, jnp.int32(0))",
        "training/test_step.py::test_every_step_and_seed_draws_another_task",
    ),
    Mutation(
        "every seed draws other orders",
        "training/step.py",
        "jax.random.key(config.training.seed)",
        "jax.random.key(0)",
        "training/test_step.py::test_every_step_and_seed_draws_another_task",
    ),
    Mutation(
        "every batch of a bound has masks of its own",
        "training/step.py",
        "_key(config, _HELD_OUT, number)",
        "_key(config, _HELD_OUT, jnp.int32(0))",
        "training/test_step.py::test_every_batch_of_an_evaluation_has_masks_of_its_own",
    ),
    Mutation(
        "the penalty of the partition is a mean over tokens",
        "training/step.py",
        "sums.z / total_tokens",
        "sums.z",
        "training/test_step.py::test_the_penalty_of_the_partition_is_a_mean_over_tokens",
    ),
    Mutation(
        "train/nll counts every token once",
        "training/step.py",
        '"train/nll": sums.nll / sums.tokens',
        '"train/nll": sums.weighted_nll / sums.weight',
        "training/test_step.py::test_what_a_step_reports",
    ),
    Mutation(
        "a spike is compared with losses of its own kind",
        "core/curriculum.py",
        "streams = len(phases) + jnp.argmax(",
        "streams = len(phases) + 0 * jnp.argmax(",
        "training/test_faults.py::test_a_loss_is_a_spike_among_its_own_kind"
        " core/test_curriculum.py::test_kinds_of_steps_are_those_that_are_drawn",
    ),
    Mutation(
        "kinds of orders that are mixed have averages of their own",
        "core/curriculum.py",
        "first += _num_kinds_of_part(part)",
        "first += 0 * _num_kinds_of_part(part)",
        "core/test_curriculum.py::test_kinds_of_steps_tell_the_kinds_of_a_mix_apart",
    ),
    Mutation(
        "each kind of a mix has its share of the steps",
        "core/curriculum.py",
        "ends = jnp.cumsum(jnp.asarray(",
        "ends = jnp.sort(jnp.asarray(",
        "core/test_curriculum.py::test_shares_of_a_mix",
    ),
    Mutation(
        "which kind a step draws says nothing about its order",
        "core/curriculum.py",
        "jax.random.uniform(jax.random.fold_in(key, _MIX))",
        "jax.random.uniform(jax.random.split(key)[0])",
        "core/test_curriculum.py::test_the_kind_that_is_chosen_says_nothing_about_the_order",
    ),
    Mutation(
        "sizes of contiguous blocks are uniform",
        "core/order.py",
        "jax.random.randint(key, (batch, length), 1, max_block + 1)",
        "jax.random.randint(key, (batch, length), 1, max_block)",
        "core/test_order.py::test_sizes_of_contiguous_blocks_are_uniform",
    ),
    Mutation(
        "drawn blocks that are mixed in have no known mask",
        "order_config.py",
        "if any(kind in typed.choices(names.DrawnBlocksOrder) for kind in kinds):",
        "if kinds[0] in typed.choices(names.DrawnBlocksOrder):",
        "test_order_config.py::test_drawn_blocks_have_no_pattern",
    ),
    Mutation(
        "devices share the work of the aggregator",
        "training/sharding.py",
        '"targets": "tensor",',
        '"targets": None,',
        "training/test_sharding.py::test_no_work_is_done_twice",
    ),
    Mutation(
        "a lease is lost to any later holder",
        "training/lease.py",
        "self.lost = any(number > self._number for number in _numbers(self._copy))",
        "self.lost = False",
        "object_storage/test_runs.py::test_whoever_was_taken_over_stores_nothing",
    ),
    Mutation(
        "long gradients are cut",
        "training/optimizer.py",
        "if settings.clip_norm else update",
        "if settings.clip_norm > 1e9 else update",
        "training/test_optimizer.py::test_long_gradients_are_cut",
    ),
    Mutation(
        "schedules follow the step, whatever was skipped",
        "training/step.py",
        "optimizer.at_step(state.opt_state, state.step)",
        "state.opt_state",
        "training/test_step.py::test_the_rate_is_that_of_the_step_whatever_was_skipped",
    ),
    Mutation(
        "the average forgets the start",
        "training/optimizer.py",
        "jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))",
        "config.ema_decay + 0.0 * step",
        "training/test_train.py::test_average_forgets_the_start",
    ),
    # --- the run ------------------------------------------------------------------------------------------------------
    Mutation(
        "a rollback passes over the checkpoint of a stop",
        "training/recovery.py",
        "among=lambda at: at <= failed and at % every == 0",
        "among=lambda at: at <= failed",
        "training/test_faults.py::test_a_rollback_passes_over_the_checkpoint_of_a_stop",
    ),
    Mutation(
        "skipped updates are counted anew after a rollback",
        "training/recovery.py",
        "skipped=jnp.zeros_like(state.skipped)",
        "skipped=state.skipped",
        "training/test_faults.py::test_a_rollback_passes_over_the_checkpoint_of_a_stop",
    ),
    Mutation(
        "the report has the rows of every failed batch",
        "training/recovery.py",
        "range(first, end), size",
        "range(first + 1, end), size",
        "training/test_faults.py::test_rollback_to_the_last_good_checkpoint",
    ),
    Mutation(
        "evaluation during training takes the average of the weights",
        "training/train.py",
        "evaluate(state.eval_params)",
        "evaluate(state.params)",
        "training/test_train.py::test_validation_takes_the_average_of_the_weights",
    ),
    Mutation(
        "the checkpoint to go back to is kept",
        "training/checkpoints.py",
        "keep = [checkpoint_managers.LatestN(training.keep_checkpoints), every]",
        "keep = [checkpoint_managers.LatestN(training.keep_checkpoints)]",
        "training/test_faults.py::test_the_checkpoint_to_go_back_to_is_kept",
    ),
    Mutation(
        "a digest sees elements that changed places",
        "training/checkpoints.py",
        "jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)",
        "jnp.sum(words * (0 * index + 1), dtype=jnp.uint32)",
        "training/test_checkpoints.py::test_digest_sees_every_element",
    ),
    Mutation(
        "what a failed save leaves is removed",
        "training/checkpoints.py",
        "folder.rmtree(missing_ok=True)",
        "pass",
        "training/test_checkpoints.py::test_remains_of_killed_saves_are_removed_at_the_start",
    ),
    Mutation(
        "rows that a full disk did not take are written later",
        "training/metrics.py",
        "            if not self._failing:\n",
        "            self._waiting = []\n            if not self._failing:\n",
        "training/test_metrics.py::test_rows_wait_for_space",
    ),
    Mutation(
        "what makes files count is stored last",
        "remote.py",
        "            for name in sorted(here, key=_turn):\n",
        "            for name in sorted(here):\n",
        "object_storage/test_runs.py::test_what_makes_files_count_is_stored_last",
    ),
    Mutation(
        "of text in a bucket, little stays on the disk",
        "data/bucket_files.py",
        "sum(self._fetched.values()) > KEPT",
        "False",
        "object_storage/test_text.py::test_little_stays_on_the_disk",
    ),
    Mutation(
        "text in a bucket that changes while it is read is noticed",
        "data/bucket_files.py",
        "if _version(self._copy.files.info(found.key)) != found.version:",
        "if False:",
        "object_storage/test_text.py::test_a_change_is_noticed",
    ),
    Mutation(
        "what was created counts as ours, although the answer was lost",
        "remote.py",
        "with self.told(), contextlib.suppress(FileExistsError):",
        "with self.told():",
        "object_storage/test_faults.py::test_an_answer_that_is_lost",
    ),
    Mutation(
        "without credentials nothing is tried for a minute",
        "stores.py",
        "    if writes or os.environ.get(_GOOGLE_FILE):\n",
        "    if False:\n",
        "object_storage/test_mistakes.py::test_no_credentials",
    ),
    Mutation(
        "the lease of a living training is not taken",
        "training/lease.py",
        "        if now != first:\n",
        "        if False:\n",
        "object_storage/test_runs.py::test_one_training_at_a_time",
    ),
    Mutation(
        "a line is appended whole or not at all",
        "files.py",
        "                file.truncate(size)\n",
        "                pass\n",
        "test_files.py::test_lines_are_appended_whole_or_not_at_all",
    ),
    Mutation(
        "a warning does not end the process if it comes again",
        "training/preemption.py",
        "asking = number in _ASKING",
        "asking = True",
        "training/test_preemption.py::test_a_warning_asks_for_a_stop_however_often_it_comes",
    ),
    Mutation(
        "a rewarmed rate begins where the rate was",
        "training/optimizer.py",
        "rewarm.rate + risen * (plain(step) - rewarm.rate)",
        "risen * plain(step)",
        "training/test_continuation.py::test_the_second_warm_up_rises_from_where_the_rate_was",
    ),
    Mutation(
        "a stream that nobody reads raises nothing",
        "streams.py",
        "except (OSError, ValueError) as error:  # ValueError: it is closed",
        "except ValueError as error:",
        "test_streams.py::test_what_cannot_be_written_is_dropped",
    ),
    # --- data ---------------------------------------------------------------------------------------------------------
    Mutation(
        "every epoch is a permutation of its own",
        "data/loader.py",
        "SeedSequence([seed, epoch, source]).generate_state(1)",
        "SeedSequence([seed, 0, source]).generate_state(1)",
        "data/test_loader.py::test_every_epoch_is_a_permutation_of_its_own",
    ),
    Mutation(
        "every stretch of the rows of a mixture has its shares",
        "data/interleaving.py",
        "else (node.right, place - before)",
        "else (node.right, place)",
        "data/test_interleaving.py::test_every_stretch_has_the_shares",
    ),
    Mutation(
        "the sources of a mixture have permutations of their own",
        "data/loader.py",
        "_permutation([seed, epoch, source], num_rows)",
        "_permutation([seed, epoch, 0], num_rows)",
        "data/test_mixture.py::test_sources_of_one_size_do_not_keep_step",
    ),
    Mutation(
        "a run does not go on with other shares of a mixture",
        "data/mixture.py",
        'f"{digest} {share}"',
        'f"{digest}"',
        "training/test_mixture.py::test_a_run_is_what_it_holds",
    ),
    Mutation(
        "the padding of the last row is not scored",
        "data/loader.py",
        "np.arange(data.length) < num_tokens",
        "np.arange(data.length) <= num_tokens",
        "data/test_loader.py::test_evaluation_sees_every_token_once",
    ),
    Mutation(
        "equal documents are in the same split",
        "data/splits.py",
        "hashlib.sha256(content)",
        'hashlib.sha256(content + b"%d" % len(hashes))',
        "data/test_splits.py",
    ),
    Mutation(
        "a shard that is a link is refused",
        "data/shards.py",
        "if file.resolve().parent != folder.resolve():",
        "if not file.exists():",
        "test_safe_loading.py::test_a_link_as_a_shard_is_not_followed",
    ),
    Mutation(
        "a shard whose name is a path is refused",
        "data/manifest.py",
        "if not _SHARD_NAME.fullmatch(shard.file):",
        'if not shard.file.endswith(".array_record"):',
        "test_safe_loading.py::test_a_path_as_the_name_of_a_shard_is_refused",
    ),
    # --- the mathematics ----------------------------------------------------------------------------------------------
    Mutation(
        "every draw of eval has a seed of its own",
        "evaluation/perplexity.py",
        "self.batch_size, self.seed + draw",
        "self.batch_size, self.seed",
        "evaluation/test_perplexity.py::test_every_draw_has_a_seed_of_its_own",
    ),
    Mutation(
        "s of the bound from above does not depend on the order that it bounds",
        "evaluation/order_bounds.py",
        "log_s_RK = _log_mean_of_others(log_p_RK)",
        "log_s_RK = np.repeat(_log_mean(log_p_RK)[:, None], log_p_RK.shape[1], axis=1)",
        "evaluation/test_order_bounds.py::test_expected_bounds_bracket_the_exact_value_and_tighten",
    ),
    Mutation(
        "the factor of the bound from above does not depend on the row that it bounds",
        "evaluation/order_bounds.py",
        "_log_mean_of_others(log_ratio_R[None])[0] if len(log_ratio_R) > 1",
        "log_ratio_R if len(log_ratio_R) > 1",
        "evaluation/test_order_bounds.py::test_bounds_are_computed_as_they_are_defined",
    ),
    Mutation(
        "orders that differ too much are not bounded from above",
        "evaluation/order_bounds.py",
        "return bool(relative <= np.log(log_p_RK.size))",
        "return bool(relative < np.inf)",
        "evaluation/test_order_bounds.py::test_orders_that_differ_too_much_are_not_bounded_from_above",
    ),
    Mutation(
        "the bound from below is the logarithm of a mean",
        "evaluation/order_bounds.py",
        "return _log_mean(np.asarray(log_p_RK, np.float64))",
        "return np.asarray(log_p_RK, np.float64).max(axis=1)",
        "evaluation/test_order_bounds.py::test_expected_bounds_bracket_the_exact_value_and_tighten",
    ),
    Mutation(
        "one token at a time has blocks of one token",
        "core/order.py",
        "block_BN=one_token_blocks(order.positions_BN).block_BN",
        "block_BN=order.block_BN",
        "evaluation/test_parallel_price.py::test_the_independence_gap_is_blocks_against_single_tokens",
    ),
    Mutation(
        "places in the stream count from its head",
        "core/documents.py",
        "stream_and_depth(*_ranks(first_BN, streams))[1]",
        "_ranks(first_BN, streams)[0]",
        "core/test_documents.py::test_depths_are_places_in_the_streams_of_documents",
    ),
    Mutation(
        "nats by place are all nats",
        "evaluation/parallel_price.py",
        "depths, length = depth_BN[valid_BN], len(self.nats)",
        "valid_BN = valid_BN & (depth_BN > 0)\n        depths, length = depth_BN[valid_BN], len(self.nats)",
        "evaluation/test_parallel_price.py::test_nats_by_place_are_those_of_the_tokens_there",
    ),
    Mutation(
        "bounds are from rows all over the split",
        "evaluation/perplexity.py",
        "chosen = [place * all_rows // num_rows for place",
        "chosen = [place for place",
        "evaluation/test_perplexity.py::test_bounds_are_those_of_the_chosen_rows",
    ),
    Mutation(
        "few rows are not bounded from above",
        "evaluation/order_bounds.py",
        "if num_draws < 2 or num_rows < MIN_ROWS:",
        "if num_draws < 2:",
        "evaluation/test_order_bounds.py::test_few_rows_are_not_bounded_from_above",
    ),
    Mutation(
        "only shards of a split are joined",
        "evaluation/suites_text.py",
        "    if len(by_name) > 1:\n",
        "    if len(by_name) > 2:\n",
        "evaluation/test_suites_text.py::test_only_shards_are_joined",
    ),
    Mutation(
        "the last word of a passage keeps its space",
        "evaluation/suites_lambada.py",
        'return found[1], f" {found[2]}"',
        "return found[1], found[2]",
        "evaluation/test_suites_lambada.py",
    ),
    Mutation(
        "what a batch of records leaves over is the beginning of the next chunk",
        "evaluation/suites.py",
        "        left = stream[whole:]\n",
        "",
        "evaluation/test_suites.py::test_chunks_are_cut_from_one_stream",
    ),
    Mutation(
        "a last, partly filled chunk is no part of a protocol's figure",
        "evaluation/suites.py",
        "            if len(row) == length:\n",
        "            if len(row):\n",
        "evaluation/test_suites.py::test_figures_are_those_of_the_model_chunk_by_chunk",
    ),
    Mutation(
        "the error of a suite's bound is per token",
        "evaluation/suites.py",
        "/ (self.chunks * length)",
        "/ self.chunks",
        "evaluation/test_suites.py::test_a_denoiser_has_a_bound_with_its_error",
    ),
    Mutation(
        "WikiText's headings are joined before shorter ones",
        "evaluation/detokenizers.py",
        "for equals in (4, 3, 2):",
        "for equals in (2, 3, 4):",
        "evaluation/test_detokenizers.py",
    ),
    Mutation(
        "geometric noise ends at 20",
        "core/order.py",
        "* 20.0**t)",
        "* 2.0**t)",
        "core/test_likelihood.py::test_masking_times_are_drawn_with_their_probabilities",
    ),
    Mutation(
        "a token does not see itself",
        "core/block_mask.py",
        "strict_len_BN=first_BN + 1,",
        "strict_len_BN=first_BN + 2,",
        "core/test_block_mask.py",
    ),
    Mutation(
        "the number of shuffled tokens rises from 1",
        "core/curriculum.py",
        "k = 1 + jnp.round(done * (config.max_permuted - 1))",
        "k = jnp.round(done * config.max_permuted)",
        "core/test_curriculum.py",
    ),
    Mutation(
        "masked tokens weigh the inverse of their time",
        "core/corruption.py",
        "jnp.where(masked_BN, 1.0 / t_B1, 0.0)",
        "jnp.where(masked_BN, 1.0, 0.0)",
        "core/test_corruption.py",
    ),
    Mutation(
        "every call of the sampler draws anew",
        "inference/sampler.py",
        "(state.key_B, state.call)",
        "(state.key_B, 0)",
        "inference/test_sampler.py",
    ),
    Mutation(
        "every text of a batch has random numbers of its own",
        "inference/requests.py",
        "np.arange(rows) if np.ndim(seed) == 0 else np.zeros(rows)",
        "np.zeros(rows)",
        "inference/test_ragged.py::test_rows_of_one_seed_differ",
    ),
    Mutation(
        "nobody sees the padding before a shorter text",
        "core/kernels/attention.py",
        "seen_ZQT &= index_T >= jnp.repeat(first_B, kv_heads)[:, None, None]",
        "pass",
        "inference/test_ragged.py::test_a_row_does_not_depend_on_the_others_with_any_aggregator",
    ),
    Mutation(
        "padding enters no state of an aggregator",
        "core/aggregation.py",
        "return x_BXD if rows.x_valid_BX is None else jnp.where(rows.x_valid_BX[..., None], x_BXD, 0)",
        "return x_BXD",
        "inference/test_ragged.py::test_a_last_chunk_that_does_not_fit",
    ),
    Mutation(
        "nothing is drawn behind the end of a text",
        "inference/sampler.py",
        "ended_B=state.ended_B | ended_B",
        "ended_B=state.ended_B & ended_B",
        "inference/test_ragged.py::test_calls_stop_when_every_text_has_ended",
    ),
    Mutation(
        "a text of many prompts depends on its line alone",
        "evaluation/completions.py",
        "seed=[request.seed for request in chosen]",
        "seed=settings.seed",
        "evaluation/test_completions.py::test_batches_change_no_text",
    ),
    Mutation(
        "a refused draft is replaced by what the draft left out",
        "inference/lossless.py",
        "jnp.log(rest_B1V), p_B1V)",
        "p_B1V, p_B1V)",
        "inference/test_lossless.py::test_all_sequences_have_their_left_to_right_probability",
    ),
    Mutation(
        "the sum of an aggregator holds no refused draft",
        "inference/lossless.py",
        "(jnp.arange(streams) <= kept_B[:, None])",
        "(jnp.arange(streams) <= state.drafts_B[:, None])",
        "inference/test_lossless.py::test_a_row_does_not_depend_on_the_others",
    ),
    Mutation(
        "a text that is complete counts its last block once",
        "inference/chosen.py",
        "x_valid_BX=(x_index_BS <= state.at_B[:, None]) & active_B[:, None],",
        "x_valid_BX=x_index_BS <= state.at_B[:, None],",
        "inference/test_chosen.py::test_the_likelihood_is_that_of_the_recorded_order",
    ),
    Mutation(
        "an end in an inner stream can be banned",
        "inference/sampler.py",
        "jnp.where(inner_BS1 & at_end_V, ending.bias, 0)",
        "jnp.where(at_end_V, ending.bias, 0)",
        "inference/test_generation.py::test_inner_streams_can_be_kept_from_ending_a_text",
    ),
    # --- a server -----------------------------------------------------------------------------------------------------
    Mutation(
        "a stream never ends inside a character",
        "serving/text.py",
        "if whole and text.endswith(_REPLACEMENT):",
        "if False:",
        "serving/test_text.py",
    ),
    Mutation(
        "nothing of a stop string is streamed",
        "serving/text.py",
        "held = max(held, next(sizes, 0))",
        "held = 0",
        "serving/test_text.py",
    ),
    Mutation(
        "a client that goes away frees its place",
        "serving/following.py",
        """        gone = True
        batcher.drop(ticket)""",
        "        return",
        "serving/test_app.py::test_a_full_queue_refuses_and_clients_that_leave_free_it",
    ),
    Mutation(
        "a batch ends with the last of its readers",
        "serving/batching.py",
        "return self.unwanted or self.failure",
        "return self.failure",
        "serving/test_batching.py::test_nothing_is_written_for_nobody",
    ),
    Mutation(
        "a short text does not wait for the others of its batch",
        "serving/batching.py",
        "not (made.call_BN[row, : made.end_B[row]] < 0).any()",
        "not (made.call_BN < 0).any()",
        "serving/test_batching.py::test_a_short_text_does_not_wait_for_a_long_one",
    ),
    Mutation(
        "choices have seeds of their own",
        "serving/api.py",
        "(self.seed + number) % 2**31",
        "self.seed",
        "serving/test_api.py::test_every_form_of_a_prompt",
    ),
    # --- GGUF files ---------------------------------------------------------------------------------------------------
    Mutation(
        "rows of queries and keys are put in halves",
        "interop/gguf.py",
        "pairs.swapaxes(1, 2)",
        "pairs",
        "interop/test_gguf.py::test_rows_of_heads_are_turned_in_halves",
    ),
    Mutation(
        "a key that nobody reads is refused",
        "interop/gguf.py",
        "        self._check_keys()\n",
        "",
        "interop/test_gguf.py::test_what_hugging_faces_config_cannot_say_is_refused",
    ),
    Mutation(
        "a tensor outside the file is found when the header is read",
        "interop/gguf_file.py",
        "if one.offset + one.size > header.size:",
        "if one.offset > header.size + one.size:",
        "interop/test_gguf.py::test_damaged_and_hostile_files_are_one_line",
    ),
    Mutation(
        "numbers are cut into words as the model's own tokenizer does",
        "interop/gguf_tokenizer.py",
        "_sequence(_split(LLAMA3_WORDS), _byte_level(use_regex=False)), None, True",
        "_sequence(_split(QWEN2_WORDS), _byte_level(use_regex=False)), None, True",
        "interop/test_gguf.py::test_a_byte_level_tokenizer_comes_back",
    ),
    # --- pretrained models --------------------------------------------------------------------------------------------
    Mutation(
        "rows of an import predict from where the source does",
        "interop/huggingface/configs.py",
        '"prediction_position": "previous"',
        '"prediction_position": "own"',
        "interop/test_importing.py::test_likelihoods_are_those_of_the_source",
    ),
    Mutation(
        "keys of an import are keys and values are values",
        "interop/huggingface/names.py",
        '(attention + "k_proj.weight", attention + "v_proj.weight")',
        '(attention + "v_proj.weight", attention + "k_proj.weight")',
        "interop/test_importing.py::test_likelihoods_are_those_of_the_source",
    ),
    Mutation(
        "a weight that an import does not use is refused",
        "interop/importing.py",
        "    if unused:\n",
        "    if False:\n",
        "interop/test_refused_imports.py::test_a_folder_that_cannot_be_imported_is_one_line",
    ),
    Mutation(
        "a config that claims more than its weights have is refused before anything of that size is made",
        "interop/importing.py",
        " or model.width * widest > num_values:",
        ":",
        "interop/test_refused_imports.py::test_a_folder_that_cannot_be_imported_is_one_line",
    ),
    Mutation(
        "the parts of an import for other orders add nothing at first",
        "interop/importing.py",
        "return np.zeros(shape, np.float32)",
        "return np.full(shape, 0.01, np.float32)",
        "interop/test_importing.py::test_parts_for_other_orders_are_closed_and_can_be_trained",
    ),
    Mutation(
        "neighbouring heads of queries share a head of keys",
        "core/layer.py",
        "jnp.repeat(a, heads // config.kv_heads, axis=2)",
        "jnp.concatenate([a] * (heads // config.kv_heads), axis=2)",
        "core/test_network.py::test_grouped_queries_are_heads_that_share_keys",
    ),
    Mutation(
        "a killed preparation goes on at the token behind its last whole shard",
        "data/packing.py",
        "whole, batch, whole - before))",
        "whole, batch, 0))",
        "data/test_packing.py::test_a_killed_preparation_goes_on",
    ),
    Mutation(
        "documents of all parts come in the sequence of the source",
        "data/merging.py",
        'order = np.lexsort((records["block"], records["piece"]))',
        'order = np.argsort(records["piece"], kind="stable")',
        "data/test_parts.py::test_any_number_of_parts_makes_the_same",
    ),
    Mutation(
        "a part that saw other text is not merged",
        "data/merging.py",
        "if now[file.name] != file.sha256:",
        "if False:",
        "data/test_parts.py::test_text_that_changed_between_parts_is_found",
    ),
    Mutation(
        "a part reads no file that is another's",
        "data/parts.py",
        "            if owner not in (None, self._number):\n                continue\n",
        "",
        "data/test_parts.py::test_a_part_neither_reads_nor_tokenizes_what_is_not_its_own",
    ),
    Mutation(
        "workers that tokenize end with their parent",
        "data/encoding.py",
        "    threading.Thread(target=_end_with_parent, daemon=True).start()\n",
        "",
        "data/test_encoding.py::test_workers_end_with_a_killed_parent",
    ),
    Mutation(
        "an export takes no checkpoint whose arrays are not what was saved",
        "training/stored_params.py",
        "        if arrays.digest(path) != digests.get(name",
        "        if False and arrays.digest(path) != digests.get(name",
        "training/test_stored_params.py::test_a_damaged_step_is_passed_over",
    ),
    Mutation(
        "files that are written weight by weight are those of the library",
        "interop/readable.py",
        "for name in sorted(shapes):",
        "for name in shapes:",
        "interop/test_readable.py::test_files_are_those_of_the_library",
    ),
    Mutation(
        "a model may have more ids than its tokenizer has tokens",
        "interop/load.py",
        "if tokenizer.vocab_size > model.vocab_size:",
        "if tokenizer.vocab_size != model.vocab_size:",
        "interop/test_importing.py::test_a_padded_vocabulary_is_kept",
    ),
    Mutation(
        "a scaled embedding is written with its scale",
        "interop/huggingface/exporting.py",
        "return value * np.float32(self.made.scale) if name",
        "return value if name",
        "interop/test_huggingface.py::test_a_model_of_our_own_is_native_if_nothing_tells_the_difference",
    ),
    Mutation(
        "what is native begins with a token",
        "interop/huggingface/native.py",
        "if (table_VD[token] * np.float32(scale) == start_D).all():",
        "if True:",
        "interop/test_huggingface.py::test_what_is_not_exactly_native_says_why",
    ),
    Mutation(
        "learned positions begin where those of GPT-2 do",
        "interop/huggingface/native.py",
        "first = 1 if config.learned_positions and not prediction_offset(config) else 0",
        "first = 0",
        "interop/test_huggingface.py::test_a_model_of_our_own_is_native_if_nothing_tells_the_difference",
    ),
    Mutation(
        "one shard is in memory at a time",
        "interop/huggingface/exporting.py",
        "if shards[-1] and size + needed > most:",
        "if shards[-1] and size + needed > 8 * most:",
        "interop/test_huggingface.py::test_one_weight_is_in_memory_at_a_time"
        " interop/test_huggingface.py::test_shards_and_their_index",
    ),
    # --- texts under a judge ------------------------------------------------------------------------------------------
    Mutation(
        "perplexity is that of the corpus, not a mean over texts",
        "evaluation/generative_results.py",
        "float(nats_T.sum() / tokens_T.sum())",
        "float((nats_T / tokens_T).mean())",
        "evaluation/test_generative.py::test_perplexity_is_that_of_the_corpus",
    ),
    Mutation(
        "the standard error counts that texts differ in length",
        "evaluation/generative_results.py",
        "nats_T - rate * tokens_T",
        "nats_T - nats_T.mean()",
        "evaluation/test_generative.py::test_the_standard_error_is_that_of_other_ways",
    ),
    Mutation(
        "what fills up a row is not scored",
        "evaluation/generative_judge.py",
        "-np.where(scored_BN, np.asarray(log_prob), 0)",
        "-np.asarray(log_prob)",
        "evaluation/test_generative.py::test_scores_are_those_of_each_text_alone",
    ),
    Mutation(
        "what a window only reads is not scored again",
        "evaluation/generative_judge.py",
        "(places_N >= seen[chosen, None]) & ",
        "",
        "evaluation/test_generative.py::test_what_lies_behind_the_context_is_scored_in_windows",
    ),
    Mutation(
        "what another process added to generation.json is kept",
        "evaluation/generative_results.py",
        "before.entries if before else self.entries",
        "self.entries",
        "evaluation/test_generative.py::test_two_processes_lose_nothing",
    ),
    Mutation(
        "the judge's end-of-text stands between documents",
        "evaluation/generative_judge.py",
        "ids += [end_of_text, *part]",
        "ids += part",
        "evaluation/test_generative.py::test_texts_are_encoded_again_for_another_tokenizer",
    ),
    Mutation(
        "end-of-text ends no text that is judged",
        "evaluation/generative.py",
        "stop_at_end=False",
        "stop_at_end=True",
        "evaluation/test_generative.py::test_figures_are_those_of_the_texts_with_these_seeds",
    ),
    Mutation(
        "texts of other weights are drawn again",
        "evaluation/generative.py",
        "weights=fingerprint(lm)",
        'weights=""',
        "evaluation/test_generative.py::test_what_is_known_is_not_drawn_again",
    ),
    Mutation(
        "entropy is that within a text",
        "evaluation/generative_tokens.py",
        "float(np.mean([entropy(row) for row in rows])), entropy(",
        "entropy(np.concatenate(rows)), entropy(",
        "evaluation/test_generative_tokens.py::test_entropy_within_texts_and_over_all",
    ),
    Mutation(
        "the longest stretch may come twice anywhere",
        "evaluation/generative_tokens.py",
        "len(grams) <= len(tokens) - middle",
        "len(grams) < len(tokens) - middle",
        "evaluation/test_generative_tokens.py",
    ),
)


def main() -> int:
    """Makes the mutations one after another and prints a line for each. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose promise, file or tests contain TEXT")
    args = parser.parse_args()
    chosen = [one for one in MUTATIONS if args.only in f"{one.promise} {one.file} {one.tests}"]
    copy = pathlib.Path(tempfile.mkdtemp(prefix="armd-mutations-"))
    unnoticed = []
    try:
        for name in COPIED:
            source, target = ROOT / name, copy / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        before = _run(copy, " ".join(dict.fromkeys(test for one in chosen for test in one.tests.split())))
        if before.returncode:
            sys.exit(f"the tests fail before anything is broken:\n{before.stdout[-2000:]}{before.stderr[-2000:]}")
        for one in chosen:
            began = time.monotonic()
            noticed = is_noticed(copy, one)
            word, seconds = "noticed" if noticed else "UNNOTICED", time.monotonic() - began
            print(f"{word:<10} {seconds:4.0f} s  {one.promise}", flush=True)
            unnoticed += [] if noticed else [one]
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} are noticed")
    return 1 if unnoticed else 0


def is_noticed(copy: pathlib.Path, mutation: Mutation) -> bool:
    """Whether the tests of a mutation fail in the copy, which is then as before. Exits if no test could be run."""
    file = copy / "armd_jax" / mutation.file
    text = file.read_text()
    file.write_text(text.replace(mutation.old, mutation.new))
    done = _run(copy, mutation.tests)
    file.write_text(text)
    if 1 < done.returncode < 128:  # no test was found, or the copy is not whole
        sys.exit(
            f"{mutation.promise}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode != 0  # 128 and more: pytest itself was killed by what was broken


def _run(copy: pathlib.Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [str(copy / "tests" / test) for test in tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
