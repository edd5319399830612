"""Faults of the engine: stale graphs, parts, loops, C."""

from tests.mutations.fault import Fault

STALE, CAPTURE = "tests/unit/test_engine_stale.py", "tests/unit/test_engine_capture.py"
ENGINE = "tests/unit/test_engine.py"
FRONT, PARTS = "pyro_avrnn/engine/front.py", "pyro_avrnn/engine/parts.py"
NATIVE, EXPRESSIONS = "pyro_avrnn/engine/native.py", "pyro_avrnn/engine/c_operations.py"
WRITER, SUMS = "pyro_avrnn/engine/c_writer.py", "pyro_avrnn/engine/c_sums.py"
C_CODE, LOOPS = "pyro_avrnn/engine/c_code.py", "pyro_avrnn/engine/loops.py"
NOISE, OVER_STEPS = "pyro_avrnn/engine/noise.py", "pyro_avrnn/engine/sums.py"
CHOICES, SCANNING = "pyro_avrnn/engine/choices.py", "pyro_avrnn/engine/scanning.py"
IN_C = f"{ENGINE}::test_the_loop_in_c_is_the_loop"

FAULTS = [
    Fault(
        FRONT,
        "hooks that come later are overlooked",
        '"skip_nnmodule_hook_guards": False',
        '"skip_nnmodule_hook_guards": True',
        (STALE, CAPTURE),
    ),
    Fault(
        FRONT,
        "methods that are replaced are overlooked",
        "if found is not None and not all(f.unchanged() for f in found.graph.functions):",
        "if False:",
        (STALE,),
    ),
    Fault(
        FRONT,
        "attributes of functions are overlooked",
        "and self.function.__dict__ == self.attributes",
        "and True",
        (STALE,),
    ),
    Fault(
        FRONT,
        "a side effect is replayed once for all steps",
        '"side_effect_replay_policy": "error"',
        '"side_effect_replay_policy": "silent"',
        (CAPTURE, STALE),
    ),
    Fault(
        FRONT,
        "what changes at every call is traced at every call",
        "if self.calls < self.again:",
        "if False:",
        (STALE,),
    ),
    Fault(
        NOISE,
        "draws with probabilities of their step are noise",
        "if not all(map(_is_blank, given)):",
        "if False:",
        (CAPTURE,),
    ),
    Fault(
        PARTS,
        "split rows of a matrix start at the first",
        "runs.append([self.ends[i], self.ends[i + 1]])",
        "runs.append([0, self.ends[i + 1] - self.ends[i]])",
        (f"{ENGINE}::test_the_fast_path_is_the_loop",),
    ),
    Fault(
        LOOPS,
        "operations of several results are kept whole",
        "early |= {u for n in early for u in n.users if u.target is operator.getitem}",
        "early |= set()",
        (f"{CAPTURE}::test_steps_of_ones_own_are_captured",),
    ),
    Fault(
        NATIVE,
        "C: what later steps give back is forgotten",
        'given = " + ".join(name for _, name in loads)',
        "given = loads[-1][1]",
        (IN_C,),
    ),
    Fault(
        WRITER,
        "C: a matrix that all steps share is packed as if by rows",
        'strides = f"{b.strides[0]}, {b.strides[1]}"',
        'strides = f"{b.shape[1]}, 1"',
        (IN_C,),
    ),
    Fault(
        WRITER,
        "C: pieces that are joined all start at the first column",
        "start += piece.shape[dim]",
        "start += 0",
        (IN_C,),
    ),
    Fault(
        EXPRESSIONS,
        "C: the gradient of tanh is linear in it",
        '"({g} * (1 - {y} * {y}))"',
        '"({g} * (1 - {y}))"',
        (IN_C,),
    ),
    Fault(
        EXPRESSIONS,
        "C: a softplus without its threshold",
        '"({b} * {x} > {limit} ? {x} : softplus_({b} * {x}) / {b})"',
        '"(softplus_({b} * {x}) * {b} / {limit} * {limit})"',
        (f"{ENGINE}::test_softplus_is_the_identity_where_torch_takes_it_for_one",),
    ),
    Fault(
        LOOPS,
        "what nobody reads has a gradient of zero",
        "return [None if n in idle else made.get(n) for n in nodes]",
        "return [made.get(n) for n in nodes]",
        (f"{ENGINE}::test_a_training_in_c_is_that_of_the_loop",),
    ),
    Fault(
        NATIVE,
        "C: particles stay as they are, whoever is chosen",
        "if parents[-1] is not None:",
        "if False:",
        (f"{ENGINE}::test_filters_in_c_are_those_of_the_loop",),
    ),
    Fault(
        NATIVE,
        "C: gradients stay with the particle that went on",
        "give_back(carry[i].add_(after[i][t + 1]), parents[t])",
        "carry[i].add_(after[i][t + 1])",
        (f"{ENGINE}::test_filters_in_c_are_those_of_the_loop",),
    ),
    Fault(
        C_CODE,
        "C: of the rows of all steps the last piece counts",
        "c, ldc, add || k > 0);",
        "c, ldc, add);",
        (f"{ENGINE}::test_products_of_all_rows_in_c",),
    ),
    Fault(
        SUMS,
        "C: rows that do not lie side by side are taken as if they did",
        "if stride * rows == size else None",
        "if True else None",
        (f"{ENGINE}::test_gradients_of_what_all_steps_share",),
    ),
    Fault(
        SUMS,
        "C: products of rows step by step begin with what memory holds",
        '(rows, "t > 0")',
        '(rows, "1")',
        (f"{ENGINE}::test_gradients_of_what_all_steps_share",),
    ),
    Fault(
        SUMS,
        "C: sums of columns leave out the first row",
        "dims = {d % len(place.shape) for d in node.args[1]}",
        "place = place._replace(shape=(place.shape[0] - 1, *place.shape[1:]))\n"
        "            dims = {d % len(place.shape) for d in node.args[1]}",
        (IN_C,),
    ),
    Fault(
        WRITER,
        "C: what all steps share is computed after it was used",
        "with self.into(self.once):",
        "with self.into(self.after):",
        (f"{ENGINE}::test_gradients_of_what_all_steps_share",),
    ),
    Fault(
        NOISE,
        "noise of all steps at once where torch draws other numbers",
        'if self.like.device.type != "cpu" or self.like.numel() % 16:',
        "return True\n        if False:",
        (f"{ENGINE}::test_the_fast_path_is_the_loop",),
    ),
    Fault(
        C_CODE,
        "C: a logarithm that is good to five digits",
        "p = fmaf(p, q, 1.0f / 5);",
        "p = fmaf(p, q, 1.001f / 5);",
        (f"{ENGINE}::test_functions_in_c_are_right_to_a_few_units_in_the_last_place",),
    ),
    Fault(
        C_CODE,
        "C: the last rows of a product are left out",
        "switch (M - m) {{",
        "switch (0) {{",
        (f"{ENGINE}::test_products_of_any_size_in_c",),
    ),
    Fault(
        LOOPS,
        "a loop without gradients does not know that it sums none",
        "self.sums: list[fx.Node] = []  # constants",
        "self.sums = [] if learns is not None else None  # constants",
        (f"{ENGINE}::test_without_gradients_nothing_is_kept_for_them",),
    ),
    Fault(
        OVER_STEPS,
        "of a sum of gradients the first term counts",
        "return sum(total(part, known) for part in parts[1:]) + total(parts[0], known)",
        "return total(parts[0], known)",
        (f"{ENGINE}::test_a_weight_that_is_used_twice_in_a_step",),
    ),
    Fault(
        OVER_STEPS,
        "gradients of joined pieces change places",
        "[total(part, known) for part in parts[1:]]",
        "[total(part, known) for part in reversed(parts[1:])]",
        (f"{ENGINE}::test_the_fast_path_is_the_loop", CAPTURE),
    ),
    Fault(
        OVER_STEPS,
        "a sum of all steps is taken along the wrong dimension",
        "dims = [d % value(args[0]).ndim + 1 for d in args[1]]",
        "dims = [(d + 1) % value(args[0]).ndim + 1 for d in args[1]]",
        (f"{ENGINE}::test_the_fast_path_is_the_loop",),
    ),
    Fault(
        CHOICES,
        "of two particles of one parent the last gives its gradient back",
        ".scatter_add_(0,",
        ".scatter_(0,",
        (f"{ENGINE}::test_filters_and_segments_of_the_fast_path_are_those_of_the_loop",),
    ),
    Fault(
        CHOICES,
        "particles stay as they are",
        "out.copy_(state.gather(0, _index(parents, state)))",
        "out.copy_(state)",
        (f"{ENGINE}::test_filters_and_segments_of_the_fast_path_are_those_of_the_loop",),
    ),
    Fault(
        SCANNING,
        "the environment asks for the plain loop in vain",
        'in ("", "0"))',
        'in ("", "0", "1"))',
        (f"{CAPTURE}::test_a_process_can_be_told_to_run_steps_as_written",),
    ),
]
