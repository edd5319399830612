"""Faults of training, checkpoints, batches, evaluation, diagnostics and the ground floor."""

from tests.mutations.fault import Fault

TRAINING = "tests/unit/test_training.py"
RESUME = "tests/unit/test_resume.py"
TRUNCATION = "tests/unit/test_truncation.py"
EVALUATION = "tests/unit/test_evaluation.py"
BOUNDS = "tests/unit/test_evaluation_bounds.py"
DOORS = "tests/unit/test_doors.py"
SURVIVORS = "tests/unit/test_survivors.py"
PROBES = "tests/unit/test_probes.py"
ARVIZ = "tests/integration/test_arviz.py"
MODES = "tests/unit/test_modes.py"
PROGRAMS = "tests/unit/test_user_programs.py"
CALIBRATION = "tests/statistical/test_calibration.py"
CRITICS_UNITS = "test_a_critics_distance_and_its_w2_are_averages_over_frames_in_its_units"

FAULTS = [
    # ---- the training loop ----
    Fault(
        "inference/training.py",
        "patience goes on from before the better bound",
        "            self.stale = 0\n            self.best.take()",
        "            self.best.take()",
        (f"{SURVIVORS}::test_patience_starts_again_after_a_better_bound",),
    ),
    Fault(
        "inference/training.py",
        "the last parameters stay instead of the best",
        "        self.best.restore()\n",
        "",
        (f"{TRAINING}::test_the_best_parameters_are_in_place_afterwards",),
    ),
    Fault(
        "inference/training.py",
        "without a validation, what hooks may break is kept at the first step alone",
        "if self.hooks and not self.history.best_step:",
        "if self.hooks and not self.history.steps:",
        (f"{TRAINING}::test_parameters_that_a_hook_breaks_are_not_kept",),
    ),
    Fault(
        "inference/training.py",
        "the factor of the learning rate is that of the next step",
        "self.lr_schedule((step - 1) / self.steps)",
        "self.lr_schedule(step / self.steps)",
        (f"{TRAINING}::test_lr_schedule_is_a_factor_on_the_learning_rate_of_every_step",),
    ),
    Fault(
        "inference/training.py",
        "a resumed run forgets the seconds before it",
        "started = time.monotonic() - history.seconds",
        "started = time.monotonic()",
        (f"{RESUME}::test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts",),
    ),
    Fault(
        "inference/training.py",
        "a state is carried out of the end of a batch",
        "windows.start = svi.loss.after if windows.more else None",
        "windows.start = svi.loss.after if windows.more else windows.start",
        (f"{TRUNCATION}::test_a_run_ends_with_a_state_only_inside_a_batch",),
    ),
    # ---- one step ----
    Fault(
        "inference/updates.py",
        "the norm that is clipped is that of the batch, not a frame",
        "get_total_norm(gradients).item() / frames",
        "get_total_norm(gradients).item()",
        (f"{TRAINING}::test_clip_norm_bounds_the_gradient_a_frame_that_reaches_the_optimiser",),
    ),
    Fault(
        "inference/updates.py",
        "x alone is counted in sequences",
        "return float(math.prod(batch[0].shape[:2]))",
        "return float(len(batch[0]))",
        (f"{TRAINING}::test_x_alone_is_counted_in_frames_as_with_a_mask",),
    ),
    Fault(
        "inference/updates.py",
        "factors of the learning rate multiply up",
        'group.setdefault("initial_lr", group["lr"]) * factor',
        'group["lr"] * factor',
        (f"{TRAINING}::test_lr_schedule_is_a_factor_on_the_learning_rate_of_every_step",),
    ),
    # ---- validation ----
    Fault(
        "inference/validation.py",
        "validation ignores the seed of the run",
        "with seeded(0 if seed is None else seed):",
        "with seeded(0):",
        (f"{TRAINING}::test_a_validation_batch_is_scored_by_iwae_with_the_same_draws_every_time",),
    ),
    # ---- checkpoints ----
    Fault(
        "inference/checkpoints.py",
        "a resumed run forgets the buffers of the best step",
        '        self.buffers = state["buffers"]\n',
        "",
        (f"{RESUME}::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",),
    ),
    Fault(
        "inference/checkpoints.py",
        "modules to keep are not looked at for numbers",
        "for p in [*stored, *further])",
        "for p in stored)",
        (f"{TRAINING}::test_parameters_that_a_hook_breaks_are_not_kept",),
    ),
    Fault(
        "inference/checkpoints.py",
        "a checkpoint forgets parameters that were not asked for since resuming",
        "self._optimisers |= {name: state",
        "self._optimisers = {name: state",
        (f"{RESUME}::test_a_state_may_be_written_twice_without_the_parameters_it_holds",),
    ),
    Fault(
        "inference/checkpoints.py",
        "what is kept is a view of the parameters",
        "tensor.detach().clone() for",
        "tensor.detach() for",
        (f"{TRAINING}::test_the_best_parameters_are_in_place_afterwards",),
    ),
    # ---- batches ----
    Fault(
        "inference/batches.py",
        "the random state of a pass is noted after its order was drawn",
        "        self.epoch, self.random = self._epoch(), random_state()\n"
        "        self._rest = iter(self.batches)\n",
        "        self.epoch = self._epoch()\n"
        "        self._rest = iter(self.batches)\n"
        "        self.random = random_state()\n",
        (f"{RESUME}::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",),
    ),
    Fault(
        "inference/batches.py",
        "a sequence without weights is counted within its portion",
        "error.sequence + first",
        "error.sequence",
        (f"{BOUNDS}::test_a_sequence_without_weights_has_its_number_in_the_whole_set",),
    ),
    # ---- evaluation ----
    Fault(
        "inference/columns.py",
        "the critic's distance is averaged over sequences",
        'columns["critic_distance_per_frame"] = distance * count.to(d.log_prior)',
        'columns["critic_distance_per_frame"] = distance * (count > 0).to(d.log_prior)',
        (f"{EVALUATION}::{CRITICS_UNITS}",),
    ),
    Fault(
        "inference/columns.py",
        "W2 is not in the units of the critic",
        "wasserstein2(d, standardise=units)",
        "wasserstein2(d)",
        (f"{EVALUATION}::{CRITICS_UNITS}",),
    ),
    Fault(
        "inference/evaluation.py",
        "sequences without frames count among the effective sample sizes",
        'columns["ess"][some].mean()',
        'columns["ess"].mean()',
        (f"{BOUNDS}::test_a_sequence_without_steps_adds_nothing_a_frame",),
    ),
    # ---- information ----
    Fault(
        "inference/information.py",
        "sequences are numbered within their portion of 64",
        "index.expand_as(keep)[keep]",
        "(index - index[0]).expand_as(keep)[keep]",
        (f"{SURVIVORS}::test_frames_know_their_sequence_in_sets_of_any_size",),
    ),
    Fault(
        "inference/information.py",
        "the classifier stops by the frames it is fitted on",
        "_nwj(*ratio(stopping))",
        "_nwj(*ratio(fitting))",
        (f"{SURVIVORS}::test_the_classifier_stops_where_frames_it_has_not_seen_say",),
    ),
    # ---- calibration ----
    Fault(
        "inference/calibration.py",
        "a tie never has the highest of its ranks",
        "device=equal.device) * (equal + 1)",
        "device=equal.device) * equal",
        (f"{CALIBRATION}::test_draws_of_the_truth_have_uniform_ranks_and_ties_are_broken_evenly",),
    ),
    Fault(
        "inference/calibration.py",
        "each quantity is tested at the level of all",
        "level / len(self.names)",
        "level",
        (f"{CALIBRATION}::test_the_verdict_is_bonferronis",),
    ),
    # ---- codes ----
    Fault(
        "inference/probes.py",
        "a drawn code is an average of draws",
        "(share * d.z[:, :1]).sum(dim=0)[0]",
        "(share * d.z).sum(dim=0).mean(dim=0)",
        (f"{PROBES}::test_a_draw_is_the_average_of_one_path",),
    ),
    Fault(
        "inference/probes.py",
        "codes are drawn in training mode",
        "with seeded(seed), evaluating(model, guide):",
        "with seeded(seed):",
        (f"{MODES}::test_codes_are_of_evaluation_mode_and_leave_the_others",),
    ),
    # ---- traces and densities ----
    Fault(
        "inference/traces.py",
        "latents of the guide alone are not counted",
        "log_q = torch.cat([(log_q[0] + extra).unsqueeze(0), log_q[1:]])",
        "log_q = torch.cat([(log_q[0] + 0.0 * extra).unsqueeze(0), log_q[1:]])",
        (f"{PROGRAMS}::test_our_elbo_is_pyros",),
    ),
    Fault(
        "inference/densities.py",
        "padding is left as it was for models that do not check",
        "return torch.where(mask.unsqueeze(-1), x, x[:, :1]), mask",
        "return x, mask",
        (f"{PROGRAMS}::test_padding_of_a_plain_program_is_overwritten",),
    ),
    # ---- requirements, schedules, modes, files, random numbers ----
    Fault(
        "inference/protocols.py",
        "NaN passes every limit",
        "if not (value >= least and value < math.inf):",
        "if value < least or value == math.inf:",
        (f"{DOORS}::test_nan_is_below_every_limit",),
    ),
    Fault(
        "inference/schedules.py",
        "a second run goes on from the end of the ramp",
        "self.total, self.calls, self._set_by_run = total, 0, True",
        "self.total, self._set_by_run = total, True",
        (f"{DOORS}::test_a_loss_that_has_been_trained_with_begins_its_ramp_again",),
    ),
    Fault(
        "inference/modes.py",
        "recurrent layers with dropout stay in training mode",
        "if isinstance(part, nn.RNNBase) and not part.dropout:",
        "if isinstance(part, nn.RNNBase):",
        (f"{MODES}::test_recurrent_layers_stay_in_training_mode_if_that_makes_no_difference",),
    ),
    Fault(
        "inference/files.py",
        "a failed write leaves its temporary file",
        "        temporary.unlink(missing_ok=True)\n",
        "        pass\n",
        (f"{RESUME}::test_a_full_disk_leaves_the_checkpoint_before",),
    ),
    Fault(
        "inference/random.py",
        "a seed is left behind in the global generator",
        "    with torch.random.fork_rng():\n        torch.manual_seed(seed)\n        yield\n",
        "    torch.manual_seed(seed)\n    yield\n",
        (f"{EVALUATION}::test_a_seed_is_a_result_and_the_global_generator_is_left_alone",),
    ),
    # ---- ArviZ ----
    Fault(
        "inference/arviz_adapter.py",
        "sites are in the order of their names, so that x_10 comes before x_2",
        "sorted((time_index(name), name) for name in samples",
        "sorted((name, name) for name in samples",
        (f"{ARVIZ}::test_steps_are_in_the_order_of_their_numbers",),
    ),
    Fault(
        "inference/arviz_adapter.py",
        "posterior and prior of the shared latent change places",
        'for f in (d.f, free["f"]))',
        'for f in (free["f"], d.f))',
        (f"{ARVIZ}::test_a_latent_that_all_steps_share_is_f",),
    ),
]
