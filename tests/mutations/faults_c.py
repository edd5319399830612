"""Faults of models, their parts, generation, recipes, data and files of sound."""

from tests.mutations.fault import Fault

UNIT = "tests/unit/test_"
CONTRACT = f"{UNIT}conformance.py::test_model_and_guide_keep_the_contract"
SLOPES = f"{UNIT}survivors.py::test_every_gradient_is_the_slope_of_the_loss"
EQUATIONS = f"{UNIT}models.py::test_a_model_is_its_papers_equations"
SEGMENTS = f"{UNIT}engine.py::test_filters_and_segments_of_the_fast_path_are_those_of_the_loop"
F_OF_PARTICLES = (
    f"{UNIT}survivors.py::test_fivo_selects_by_the_weight_of_f_too_but_not_for_an_empty_sequence"
)
PATH_BEFORE = (
    f"{UNIT}masks.py::test_a_critics_score_depends_on_the_path_before_t_and_on_no_later_code"
)

FAULTS = [
    # the contract and the rollout
    Fault(
        "pyro_avrnn/sequence.py",
        "padding becomes 0, which not every emission can score",
        "x = torch.where(mask.unsqueeze(-1), x, self.padding)",
        "x = torch.where(mask.unsqueeze(-1), x, 0.0)",
        (f"{CONTRACT}[vrnn-logistic]",),
    ),
    Fault(
        "pyro_avrnn/sequence.py",
        "the loop counts p(f) of a sequence without steps",
        "                with _masked(ragged, 1):\n"
        '                    state = self.condition(state, pyro.sample("f", self.prior_f(',
        "                with nullcontext():\n"
        '                    state = self.condition(state, pyro.sample("f", self.prior_f(',
        (f"{UNIT}masks.py::test_a_latent_of_all_steps_weighs_nothing_without_steps",),
    ),
    Fault(
        "pyro_avrnn/sequence.py",
        "asking for the width of the features draws dropout's numbers",
        "with torch.no_grad(), torch.random.fork_rng([], enabled=self.training):",
        "with torch.no_grad():",
        (f"{UNIT}modes.py::test_dropout_changes_nothing_in_evaluation_mode",),
    ),
    Fault(
        "pyro_avrnn/rollout.py",
        "the second pass over a segment goes on with other random numbers",
        "                torch.set_rng_state(state)\n",
        "                pass\n",
        (f"{SEGMENTS}[vrnn-conditional-flow-normal]",),
    ),
    Fault(
        "pyro_avrnn/rollout.py",
        "each segment counts its steps from 0 when particles are selected",
        "lambda t, *terms: choose(t + start, *terms)",
        "lambda t, *terms: choose(t, *terms)",
        (f"{SEGMENTS}[vrnn-conditional-flow-normal]",),
    ),
    Fault(
        "pyro_avrnn/rollout.py",
        "all particles share one draw of f",
        "f = draw(proposal.expand(Size(shape[:2])), learnable(guide))",
        "f = draw(proposal, learnable(guide)).expand(shape)",
        (F_OF_PARTICLES,),
    ),
    # networks and shapes
    Fault(
        "pyro_avrnn/networks.py",
        "a backward encoder begins in the padding",
        "turned = mask.sum(dim=1, keepdim=True) - 1 - steps",
        "turned = (x.shape[1] - 1 - steps).expand(mask.shape)",
        (f"{UNIT}networks.py",),
    ),
    Fault(
        "pyro_avrnn/networks.py",
        "dropout in evaluation mode too",
        "dropped(x, self.dropout if self.training else 0.0)",
        "dropped(x, self.dropout)",
        (f"{UNIT}generation.py::test_dropout_is_off_and_modes_come_back",),
    ),
    Fault(
        "pyro_avrnn/networks.py",
        "a network's own bias of the scale is not passed on",
        "return loc, positive(raw, self.min_scale, self.scale_bias)",
        "return loc, positive(raw, self.min_scale)",
        (f"{UNIT}networks.py::test_a_scale_has_the_floor_and_the_bias_it_was_given",),
    ),
    Fault(
        "pyro_avrnn/shapes.py",
        "a part that does not state its width counts as 0",
        "return None if None in sizes else sum(sizes)",
        "return sum(size or 0 for size in sizes)",
        (f"{UNIT}networks.py",),
    ),
    # critics and priors
    Fault(
        "pyro_avrnn/critics.py",
        "the last layer of a Lipschitz critic is not normalised",
        "self.rest = nn.Sequential(*layers, linear(critic_dim, 1))",
        "self.rest = nn.Sequential(*layers, nn.Linear(critic_dim, 1))",
        (f"{UNIT}critics.py::test_every_layer_that_z_passes_has_norm_one",),
    ),
    Fault(
        "pyro_avrnn/critics.py",
        "a window over the path begins with the code that is scored",
        "for lag in range(1, self.window + 1):",
        "for lag in range(self.window):",
        (PATH_BEFORE,),
    ),
    Fault(
        "pyro_avrnn/priors.py",
        "a mixture prior's scales have no floor",
        "            num_components * self.z_dim,\n"
        "            self.hidden,\n            min_scale=self.min_scale,\n",
        "            num_components * self.z_dim,\n            self.hidden,\n",
        (f"{UNIT}models.py::test_a_mixture_prior_is_scipys_mixture",),
    ),
    Fault(
        "pyro_avrnn/priors.py",
        "a gated transition does not start as the identity",
        "if self.h_dim == self.z_dim:\n            nn.init.eye_",
        "if self.h_dim != self.z_dim:\n            nn.init.eye_",
        (f"{UNIT}models.py::test_a_gated_transition_starts_as_the_identity_where_sizes_agree",),
    ),
    Fault(
        "pyro_avrnn/priors.py",
        "a mixture's later dimensions do not follow the draw of the earlier ones",
        "e = (z_i.unsqueeze(-1) - loc) / scale",
        "e = (drawn[..., i : i + 1] - loc) / scale",
        ("tests/statistical/test_mixture_gradients.py",),
    ),
    # emissions
    Fault(
        "pyro_avrnn/emissions.py",
        "a mixture emission's scales have no floor",
        "diagonal_normal(loc, positive(raw, self.min_scale))",
        "diagonal_normal(loc, positive(raw, 0.0))",
        (f"{UNIT}emissions.py::test_mixture_of_normals_by_hand",),
    ),
    Fault(
        "pyro_avrnn/logistics.py",
        "the first cell loses its tail",
        ".masked_fill_(first | last, 1.0)",
        ".masked_fill_(last, 1.0)",
        (f"{UNIT}emissions.py::test_masses_sum_to_one",),
    ),
    # guides
    Fault(
        "pyro_avrnn/guides.py",
        "a residual guide records gradients where none are wanted",
        "torch.set_grad_enabled(self.prior_gradient and torch.is_grad_enabled())",
        "torch.set_grad_enabled(self.prior_gradient)",
        (
            f"{UNIT}models.py::test_a_residual_guide_lets_gradients_reach_the_prior_where_they_are_wanted",
        ),
        "the sum after the block has no gradient under no_grad either: time is lost, no value",
    ),
    Fault(
        "pyro_avrnn/guides.py",
        "a residual guide stops the prior's gradient by default",
        "prior_gradient: bool = True",
        "prior_gradient: bool = False",
        (
            f"{UNIT}models.py::test_a_residual_guide_lets_gradients_reach_the_prior_where_they_are_wanted",
        ),
    ),
    Fault(
        "pyro_avrnn/guides.py",
        "the order of a guide's flows does not alternate",
        "permutation=order.flip(0) if i % 2 else order,",
        "permutation=order,",
        (f"{UNIT}survivors.py::test_every_dimension_of_a_flow_depends_on_every_other",),
    ),
    # models
    Fault(
        "pyro_avrnn/models/storn.py",
        "guide and critic do not see x of the step before",
        "return broadcast_cat(self.cell.output(state.memory), state.seen)",
        "return self.cell.output(state.memory)",
        (f"{UNIT}models.py::test_guides_and_critics_read_all_of_a_state",),
    ),
    Fault(
        "pyro_avrnn/models/srnn.py",
        "z of the step before is handed on once more",
        "return SRNNState(self.cell(self.encode_x(x_t), state.memory), z_t)",
        "return SRNNState(self.cell(self.encode_x(x_t), state.memory), state.z + 0 * z_t)",
        (f"{EQUATIONS}[srnn]",),
    ),
    Fault(
        "pyro_avrnn/models/dsae.py",
        "guide and critic do not see f",
        "return broadcast_cat(self.cell.output(state.memory), state.f)",
        "return self.cell.output(state.memory)",
        (f"{UNIT}models.py::test_guides_and_critics_read_all_of_a_state",),
    ),
    Fault(
        "pyro_avrnn/models/vae.py",
        "a prior that reads h reads 0",
        "state.nothing.new_ones(",
        "state.nothing.new_zeros(",
        (f"{UNIT}models.py::test_a_prior_without_a_past_reads_one",),
    ),
    Fault(
        "pyro_avrnn/models/dmm.py",
        "z_0 is not learnt",
        "DMMState(self.z_0.expand(",
        "DMMState(self.z_0.detach().expand(",
        (f"{SLOPES}[dmm-loss0]",),
    ),
    Fault(
        "pyro_avrnn/models/lgssm.py",
        "padding still has a precision",
        "torch.where(mask[..., None, None], matrix, 0.0)",
        "matrix",
        (f"{UNIT}lgssm.py::test_the_smoother_is_tight_on_ragged_sequences",),
    ),
    Fault(
        "pyro_avrnn/pixels.py",
        "draws see the rows above one row too high",
        "rows[k + 1][:, :, r + i, r : r + side] = above[:, :, 0]",
        "rows[k + 1][:, :, r + i - 1, r : r + side] = above[:, :, 0]",
        (f"{UNIT}pixelcnn.py::test_draws_are_those_of_a_full_pass_for_every_pixel",),
    ),
    Fault(
        "pyro_avrnn/models/pixelcnn.py",
        "the guide divides a side by 4 rounding down",
        "quarter = -(-self.side // 4)",
        "quarter = self.side // 4",
        (
            f"{UNIT}pixelcnn.py::test_the_guide_owns_no_parameter_of_the_model_and_reads_each_image",
        ),
    ),
    # generation
    Fault(
        "pyro_avrnn/generation.py",
        "a path is chosen by the weight of the last step alone",
        "chosen = _choose(d.log_weight.sum(dim=0), num_continuations)",
        "chosen = _choose(d.log_weight[-1], num_continuations)",
        (f"{UNIT}generation.py::test_continuations_follow_kalman",),
    ),
    Fault(
        "pyro_avrnn/generation.py",
        "the guide of a continuation stays in training mode",
        "    with evaluating(model, guide):\n"
        "        x, mask = with_steps(model, x, mask)\n        d = ",
        "    with evaluating(model):\n        x, mask = with_steps(model, x, mask)\n        d = ",
        (f"{UNIT}generation.py::test_the_guides_own_dropout_is_off",),
    ),
    # recipes
    Fault(
        "pyro_avrnn/recipes/build.py",
        "a recipe's own settings overrule the user's",
        "return {**{k: v for k, v in own.items() if k in takes}, **given}",
        "return {**given, **{k: v for k, v in own.items() if k in takes}}",
        (f"{UNIT}recipes.py::test_the_users_options_come_before_the_recipes_own",),
    ),
    Fault(
        "pyro_avrnn/recipes/build.py",
        "dropout hides features of z too",
        'dropout = {"x": self.given["dropout"], "z": 0.0}',
        'dropout = dict.fromkeys("xz", self.given["dropout"])',
        (f"{UNIT}recipes.py::test_dropout_hides_features_of_x_alone",),
    ),
    Fault(
        "pyro_avrnn/recipes/papers.py",
        "the guide of an AVRNN moves the prior",
        'parts = {"guide": "residual", "prior_gradient": False} | parts',
        'parts = {"guide": "residual"} | parts',
        (f"{UNIT}recipes.py::test_the_guide_of_an_avrnn_does_not_move_the_prior",),
    ),
    # data
    Fault(
        "pyro_avrnn/data/dataset.py",
        "padding counts in the statistics of training",
        "frames = train.x[train.mask].double()\n    mean, std",
        "frames = train.x.flatten(0, 1).double()\n    mean, std",
        (f"{UNIT}data.py::test_vowels_is_standardised_by_its_training_frames",),
    ),
    Fault(
        "pyro_avrnn/data/npz.py",
        "data are binary if a single sequence is",
        "binary = all(((x == 0) | (x == 1)).all() for x in series)",
        "binary = any(((x == 0) | (x == 1)).all() for x in series)",
        (f"{UNIT}data.py::test_data_are_binary_only_if_all_sequences_are",),
    ),
    Fault(
        "pyro_avrnn/data/sequences.py",
        "the next seed's first epoch is this seed's second",
        "np.random.SeedSequence([self.seed, self.epoch])",
        "np.random.SeedSequence([self.seed + self.epoch])",
        (f"{UNIT}data.py::test_batches_follow_seed_and_epoch_only",),
    ),
    Fault(
        "pyro_avrnn/data/_speech.py",
        "speech is standardised by all splits",
        'train = [samples for split, _, samples in pieces if split == "train"]',
        "train = [samples for _, _, samples in pieces]",
        (f"{UNIT}data.py::test_speech_is_standardised_by_its_training_samples",),
    ),
    Fault(
        "pyro_avrnn/data/mel.py",
        "the floor of silence becomes sound",
        "loudest) - _FLOOR, 0.0)",
        "loudest), 0.0)",
        (f"{UNIT}digits.py::test_silent_and_overflowing_frames_give_finite_sound",),
    ),
    Fault(
        "pyro_avrnn/data/companding.py",
        "the loudest level becomes the most negative sample",
        "* 2**15).clip(_LEAST, _MOST).astype(np.int16)",
        "* 2**15).astype(np.int32).astype(np.int16)",
        (f"{UNIT}mu_law.py::test_shapes_kinds_and_tensors",),
    ),
    Fault(
        "pyro_avrnn/media.py",
        "new notes are struck before old ones are released",
        '(("note_off", -1), ("note_on", 1))',
        '(("note_on", 1), ("note_off", -1))',
        (f"{UNIT}media.py::test_at_a_step_keys_are_released_before_others_are_struck",),
    ),
]
