"""Faults of the critic, the distances, the bounds and the filter."""

from tests.mutations.fault import Fault

ADVERSARIAL, ROLES = "inference/adversarial.py", "inference/roles.py"
DIVERGENCES, CONSTRAINTS = "inference/divergences.py", "inference/constraints.py"
OBJECTIVES, GRADIENTS = "inference/objectives.py", "inference/gradients.py"
BOUNDS, WEIGHTS = "inference/bounds.py", "inference/weights.py"
RESAMPLING, PARTICLES = "inference/resampling.py", "inference/particles.py"

CRITIC = "tests/unit/test_adversarial.py"
OWNERS = "tests/unit/test_ownership.py"
CALIBRATION = "tests/statistical/test_critic_calibration.py"
FILTER = "tests/unit/test_particles.py"
LOSSES = "tests/unit/test_objectives.py"
WINDOWS = "tests/unit/test_truncation.py"
KNOWN_SLOPES = f"{CALIBRATION}::test_the_penalty_is_that_of_the_slope_in_each_code"

FAULTS = [
    # ---- the critic, 16 ----
    Fault(
        ROLES,
        "the shared path passes gradients",
        "path = densities.z.detach()",
        "path = densities.z",
        (CRITIC,),
    ),
    Fault(
        ROLES,
        "redrawn: the posterior's path is the rollout's, not what is scored",
        "Codes(prior, path=prior), Codes(posterior, path=posterior)",
        "Codes(prior, path=prior), Codes(posterior, path=densities.z)",
        (CRITIC,),
    ),
    Fault(
        ROLES,
        "h passes gradients",
        "return densities.h.detach()",
        "return densities.h",
        (CRITIC,),
    ),
    Fault(
        ROLES,
        "joint shows x of the step before",
        "x = densities.x.expand(",
        "x = densities.x.roll(1, 0).expand(",
        (CRITIC,),
    ),
    Fault(
        ADVERSARIAL,
        "a penalty scores in training mode",
        "with evaluating(self.critic):",
        "with torch.enable_grad():",
        (CRITIC,),
    ),
    Fault(
        ADVERSARIAL,
        "a penalty moves the critic",
        "{name: p.detach() for name, p in self.critic.named_parameters()}",
        "dict(self.critic.named_parameters())",
        (OWNERS,),
    ),
    Fault(
        ADVERSARIAL,
        "posterior draws stay for every view of paths",
        "i == 0 or self.view is trajectory_redrawn or",
        "i == 0 or self.sees_path or",
        (CRITIC,),
    ),
    Fault(
        "inference/roles.py",
        "the critic is trained on padded frames, too",
        "return prior[keep], posterior[keep]",
        "return prior.flatten(), posterior.flatten()",
        (CRITIC,),
    ),
    Fault(
        ADVERSARIAL,
        "gradients add up over critic steps",
        "self.optim.zero_grad(set_to_none=True)\n        loss.backward()\n"
        "        self.optim.step()\n"
        "        self.optim.zero_grad(set_to_none=True)",
        "loss.backward()\n        self.optim.step()",
        (CRITIC,),
    ),
    Fault(
        ADVERSARIAL,
        "the critic's constraint costs nothing",
        "loss = loss + self.divergence.constraint.cost(self.critic, *sides, mask)",
        "self.divergence.constraint.cost(self.critic, *sides, mask)",
        (CRITIC, f"{CALIBRATION}::test_the_gradient_penalty_measures_a_shift"),
    ),
    Fault(
        ADVERSARIAL,
        "weights are clipped before the step, not after",
        "self.optim.step()\n        self.optim.zero_grad(set_to_none=True)\n"
        "        self.divergence.constraint.project(self.critic)",
        "self.divergence.constraint.project(self.critic)\n        self.optim.step()\n"
        "        self.optim.zero_grad(set_to_none=True)",
        (f"{OWNERS}::test_clipping_keeps_every_weight_within_its_bound",),
    ),
    Fault(
        ROLES,
        "codes are in units of the proposal",
        "loc, scale = normal_parameters(densities.prior)",
        "loc, scale = normal_parameters(densities.proposal)",
        (CRITIC,),
    ),
    Fault(
        "inference/alternating.py",
        "the adversarial step scores a prior that is a constant",
        "densities = densities._replace(prior=model.transition(states))",
        "densities = densities._replace(states=states)",
        (f"{OWNERS}::test_the_adversarial_step_moves_exactly_prior_and_guide",),
    ),
    Fault(
        "inference/alternating.py",
        "the adversarial step encodes padding as it came",
        "guide.encode(*check_batch(model, *args))",
        "guide.encode(*args)",
        (CRITIC,),
    ),
    Fault(
        ADVERSARIAL,
        "closed forms are averaged over padded frames, too",
        "count = densities.mask.expand_as(kl).sum()",
        "count = kl.numel()",
        ("tests/unit/test_critics.py",),
    ),
    Fault(
        ADVERSARIAL,
        "the hook of a window draws one particle",
        '{"start": start, "num_particles": len(start[0])}',
        '{"start": type(start)(*(part[:1] for part in start))}',
        (f"{WINDOWS}::test_a_critic_is_trained_on_the_states_of_its_window",),
    ),
    # ---- distances, 9 ----
    Fault(
        CONSTRAINTS,
        "codes are mixed in each dimension apart, not along a line",
        "mix = torch.rand_like(prior.z[..., :1])",
        "mix = torch.rand_like(prior.z)",
        (CRITIC,),
    ),
    Fault(
        CONSTRAINTS,
        "a path that both sides share counts as their own",
        "return prior.path is not None and prior.path is not posterior.path",
        "return prior.path is not None",
        (KNOWN_SLOPES,),
    ),
    Fault(
        CONSTRAINTS,
        "one-sided is two-sided",
        "else (slope - 1).clamp(min=0)",
        "else (slope - 1).abs()",
        (KNOWN_SLOPES,),
    ),
    Fault(
        CONSTRAINTS,
        "padded scores slope in observed codes",
        "observed = scores.where(mask.expand_as(scores), 0.0).sum()",
        "observed = scores.sum()",
        (KNOWN_SLOPES,),
    ),
    Fault(
        CONSTRAINTS,
        "the slope is a constant",
        "torch.autograd.grad(observed, inputs, create_graph=True)",
        "torch.autograd.grad(observed, inputs)",
        (f"{OWNERS}::test_the_gradient_penalty_differentiates_an_lstm_twice",),
    ),
    Fault(
        CONSTRAINTS,
        "weights are clipped from above alone",
        "parameter.clamp_(-bound, bound)",
        "parameter.clamp_(max=bound)",
        (f"{OWNERS}::test_clipping_keeps_every_weight_within_its_bound",),
    ),
    Fault(
        CONSTRAINTS,
        "on='all' leaves the context's slope free",
        'if on == "all":',
        'if on == "all" and own_paths:',
        (CRITIC,),
    ),
    Fault(
        DIVERGENCES,
        "the critic descends",
        "critic_loss=lambda prior, posterior: posterior.mean() - prior.mean()",
        "critic_loss=lambda prior, posterior: prior.mean() - posterior.mean()",
        (CRITIC,),
    ),
    Fault(
        DIVERGENCES,
        "W2 counts padded frames",
        "return square.sum(dim=(0, -1)).sqrt().where(densities.mask, 0.0)",
        "return square.sum(dim=(0, -1)).sqrt()",
        ("tests/unit/test_critics.py",),
    ),
    # ---- losses, their gradients, the filter, 20 ----
    Fault(
        OBJECTIVES,
        "the scale of a subsampled plate leaves penalties out",
        "return loss * densities.scale if densities.scale != 1.0 else loss",
        "return loss - (densities.scale - 1.0) * objective.sum()",
        ("tests/unit/test_user_programs.py",),
    ),
    Fault(
        OBJECTIVES,
        "the correction of the gradient has the next call's weight",
        "loss = loss + self.correction(densities, model, guide)\n"
        "            self.clock.calls += 1",
        "self.clock.calls += 1\n"
        "            loss = loss + self.correction(densities, model, guide)",
        (f"{LOSSES}::test_a_scheduled_kl_weight_follows_the_clock",),
    ),
    Fault(
        OBJECTIVES,
        "free bits are averaged over sequences that have ended",
        "count = observed.sum(dim=1, keepdim=True).clamp(min=1)",
        "count = observed.shape[1]",
        (f"{LOSSES}::test_free_bits_floor_the_batch_mean_of_every_steps_kl",),
    ),
    Fault(
        OBJECTIVES,
        "the ELBO overlooks a single particle without a weight",
        "require_usable(log_weight.cumsum(dim=0).sum(dim=1))",
        "require_usable(log_weight.cumsum(dim=0).logsumexp(dim=1))",
        (f"{FILTER}::test_an_elbo_names_the_step_where_one_particle_has_no_weight",),
    ),
    Fault(
        OBJECTIVES,
        "a filter's window hands on by weights that are spent",
        "return selection.resampler(selection.last_stretch(log_weight))",
        "return selection.resampler(normalise(log_weight.sum(dim=0), len(log_weight)))",
        (f"{WINDOWS}::test_a_filter_resamples_by_the_weights_it_has_not_spent",),
    ),
    Fault(
        GRADIENTS,
        "parameters of the model that the guide reads get the other gradient",
        "if p.requires_grad and id(p) not in shared]",
        "if p.requires_grad]",
        (f"{LOSSES}::test_dreg_leaves_parameters_that_the_model_has_too_as_they_are",),
    ),
    Fault(
        GRADIENTS,
        "the density of f is not held constant",
        "loc, scale = (p.detach() for p in normal_parameters(densities.proposal_f))",
        "loc, scale = normal_parameters(densities.proposal_f)",
        (
            "tests/statistical/test_global_evidence.py"
            "::test_the_doubly_reparameterised_gradient_of_f_has_the_same_mean",
        ),
    ),
    Fault(
        GRADIENTS,
        "ancestors are credited with the stretch that chose them",
        "surprise = path[-1] - path - expected",
        "surprise = path[-1] - torch.cat([0.0 * path[:1], path[:-1]]) - expected",
        (f"{FILTER}::test_a_sequence_is_credited_for_its_own_resamplings_alone",),
    ),
    Fault(
        GRADIENTS,
        "sequences that were not resampled are credited",
        "total = total + torch.where(resampled[t], chosen * surprise[t], 0.0)",
        "total = total + chosen * surprise[t]",
        (f"{FILTER}::test_a_sequence_is_credited_for_its_own_resamplings_alone",),
    ),
    Fault(
        BOUNDS,
        "the closed-form KL forgets f",
        "kl = torch.cat([(kl[0] + of_f).unsqueeze(0), kl[1:]])",
        "kl = kl + 0.0 * of_f",
        (
            "tests/statistical/test_global_evidence.py"
            "::test_the_closed_form_kl_counts_f_as_pyro_does",
        ),
    ),
    Fault(
        BOUNDS,
        "the closed-form KL counts padded steps",
        "return kl.where(densities.mask, 0.0)",
        "return kl",
        (f"{LOSSES}::test_elbo_is_reconstruction_less_the_weighted_kl",),
    ),
    Fault(
        BOUNDS,
        "a stretch begins one step early",
        "resampled.long().cumsum(dim=0), (0, 0, 1, 0))",
        "resampled.long().cumsum(dim=0), (0, 0, 0, 1))",
        (f"{FILTER}::test_fivo_is_the_running_product_by_hand",),
    ),
    Fault(
        WEIGHTS,
        "the step of an error is counted from 0",
        "require_usable(total.unsqueeze(0), first_step=step)",
        "require_usable(total.unsqueeze(0), first_step=step - 1)",
        (f"{FILTER}::test_degenerate_weights_name_step_and_sequence",),
    ),
    Fault(
        WEIGHTS,
        "the threshold of k-hat is one of the tail's own weights",
        "column[:tail].exp() - column[tail].exp()",
        "column[:tail].exp() - column[tail - 1].exp()",
        (
            "tests/unit/test_evaluation.py::test_the_tail_of_k_hat_is_all_that_exceeds_the_next_weight",
        ),
    ),
    Fault(
        RESAMPLING,
        "stratified takes one draw for all parts",
        'equal parts of the unit interval."""\n'
        "    return _invert(log_weight, _grid(log_weight, torch.rand_like(log_weight)))",
        'equal parts of the unit interval."""\n'
        "    return _invert(log_weight, _grid(log_weight, torch.rand_like(log_weight[:1])))",
        (f"{FILTER}::test_the_counts_of_even_points_are_bounded",),
    ),
    Fault(
        RESAMPLING,
        "weights of sequences that were not resampled are forgotten",
        "log_weight = torch.where(due, fresh, log_weight)",
        "log_weight = torch.where(due, fresh, 0.0)",
        (
            f"{FILTER}::test_fivo_is_the_running_product_by_hand",
            f"{FILTER}::test_fivo_and_the_differentiable_filter_agree",
        ),
    ),
    Fault(
        RESAMPLING,
        "the effective sample size is held against the number of sequences",
        "< fraction * log_weight.shape[0]",
        "< fraction * log_weight.shape[-1]",
        (f"{FILTER}::test_criteria_say_which_sequences_are_resampled",),
    ),
    Fault(
        PARTICLES,
        "f has a weight in a sequence without a step",
        "log_weight = torch.where(self.mask[:, 0], ratio, 0.0)",
        "log_weight = ratio",
        ("tests/unit/test_survivors.py::test_f_weighs_nothing_in_a_sequence_without_a_step",),
    ),
    Fault(
        PARTICLES,
        "lineages follow the parents of the step before",
        "for parents in self.ancestors[1:].flip(0):",
        "for parents in self.ancestors[:-1].flip(0):",
        (f"{FILTER}::test_lineages_are_traced",),
    ),
    Fault(
        PARTICLES,
        "what a particle was favoured by is not counted when it is chosen",
        "factor, fresh = log_mean_exp(log_weight + favour, dim=0),",
        "factor, fresh = log_mean_exp(log_weight, dim=0),",
        (
            "tests/unit/test_survivors.py"
            "::test_the_auxiliary_weight_of_the_particle_itself_is_taken_back",
        ),
    ),
]
