"""Faults of global features: mutual information, pairs, bonuses, strings, judges."""

from tests.mutations.fault import Fault

ESTIMATES = "tests/statistical/test_mutual_information.py"
GLOBAL = "tests/unit/test_global_information.py"
STRINGS, JUDGES = "tests/unit/test_strings.py", "tests/unit/test_judges.py"
ESTIMATORS, PAIRS = "inference/mutual_information.py", "inference/pairs.py"
BONUSES, AUDIT = "inference/global_information.py", "inference/audit.py"
PROBES, VERIFICATION = "inference/recurrent_probes.py", "inference/verification.py"
CRITICS, DSAE = "pyro_avrnn/pair_critics.py", "pyro_avrnn/models/dsae.py"

FAULTS = [
    Fault(
        ESTIMATORS,
        "InfoNCE leaves the pair itself out of the sum",
        "among = torch.cat([others, pairs.unsqueeze(-1)], dim=-1)",
        "among = others",
        (ESTIMATES,),
    ),
    Fault(
        ESTIMATORS,
        "the average log-ratio is that of all pairs",
        "penalty=lambda others, pairs: pairs.mean())",
        "penalty=lambda others, pairs: (pairs.sum() + others.sum()) / others.numel())",
        (ESTIMATES,),
    ),
    Fault(
        ESTIMATORS,
        "CLUB is half of itself",
        "pairs.mean() - others.mean()",
        "0.5 * (pairs.mean() - others.mean())",
        (ESTIMATES,),
    ),
    Fault(
        ESTIMATORS,
        "the shuffle keeps a pair where it was",
        "rows[~own].view(len(rows), count - 1)",
        "rows[:, : count - 1]",
        (GLOBAL,),
    ),
    Fault(
        ESTIMATORS,
        "a critic that is no density is taken for one",
        'if not getattr(critic, "conditional", False):',
        "if False:",
        (GLOBAL,),
    ),
    Fault(PAIRS, "f is not detached", "f=pairs.f.detach()", "f=pairs.f", (GLOBAL,)),
    Fault(
        PAIRS,
        "padded steps are scored",
        "seen = codes.mask if len(scores) > 1",
        "seen = torch.ones_like(codes.mask) if len(scores) > 1",
        (GLOBAL,),
    ),
    Fault(
        "inference/adversarial.py",
        "further steps of a critic pair draws of two passes",
        "or self.view is trajectory_redrawn or self.role.of_sequences",
        "or self.view is trajectory_redrawn",
        (GLOBAL,),
    ),
    Fault(
        "inference/adversarial.py",
        "information is priced by the frame",
        "return value * densities.mask.shape[-1] / densities.mask.sum()",
        "return value",
        (GLOBAL,),
    ),
    Fault(
        BONUSES,
        "the bonus is a price",
        "return -per_frame(self.information(densities), densities)",
        "return per_frame(self.information(densities), densities)",
        (ESTIMATES,),
    ),
    Fault(
        BONUSES,
        "free bits are taken off above the limit",
        "(kl - self.free_bits).clamp(max=0.0)",
        "(kl - self.free_bits).clamp(min=0.0)",
        (GLOBAL,),
    ),
    Fault(
        "inference/objectives.py",
        "the factor on the KL of f forgets that of all KL",
        "return (1.0 - of_f) * kl_weight * kl",
        "return (1.0 - of_f) * kl",
        (GLOBAL,),
    ),
    Fault(
        "inference/objectives.py",
        "the pull of a penalty is that of the bound",
        "self._shares[penalty.name] = price * frames * paid",
        "self._shares[penalty.name] = price * frames * paid.detach()",
        (GLOBAL,),
    ),
    Fault(
        CRITICS,
        "a critic of pairs reads padding",
        "seen = mask.expand(",
        "seen = torch.ones_like(mask).expand(",
        (GLOBAL,),
    ),
    Fault(
        CRITICS,
        "rows and columns change places",
        "return read @ known.mT",
        "return known @ read.mT",
        (GLOBAL,),
    ),
    Fault(
        DSAE,
        "padding counts in the average of a sequence",
        "seen = mask.unsqueeze(-1).to(x)",
        "seen = torch.ones_like(mask).unsqueeze(-1).to(x)",
        (GLOBAL,),
    ),
    Fault(
        DSAE,
        "segments keep the order of steps",
        "order = torch.rand(mask.shape, dtype=x.dtype, device=x.device).masked_fill(outside, 2.0)",
        "order = (steps / len(steps)).expand(mask.shape).masked_fill(outside, 2.0)",
        (GLOBAL,),
    ),
    Fault(
        DSAE,
        "evaluation shows segments, too",
        "if self.segment is not None and self.training:",
        "if self.segment is not None:",
        (GLOBAL,),
    ),
    Fault(
        AUDIT,
        "the audit judges on what the critic was fitted to",
        "found = _estimates(hook, heldout, groups)",
        "found = _estimates(hook, fitting, groups)",
        (GLOBAL,),
    ),
    Fault(
        PROBES,
        "a probe of a sequence weighs padding",
        "share = mask.to(rows) / mask.sum(dim=1, keepdim=True)",
        "share = torch.ones_like(mask).to(rows) / mask.sum(dim=1, keepdim=True)",
        (JUDGES,),
    ),
    Fault(
        VERIFICATION,
        "codes of one speaker are accepted by chance",
        "alike = names[first] == names[second]",
        "alike = names[first] != names[second]",
        (JUDGES,),
    ),
    Fault(
        VERIFICATION,
        "disentanglement is completeness",
        "completeness=float(_purity(table.T).mean())",
        "completeness=float((by_code * _purity(table)).sum())",
        (JUDGES,),
    ),
    Fault(
        "pyro_avrnn/data/strings.py",
        "the digit of a frame is that of the next",
        "row[start:end] = digit",
        "row[start + 1 : end + 1] = digit",
        (STRINGS,),
    ),
    Fault(
        "pyro_avrnn/data/mel.py",
        "a warp forgets that bands have deviations of their own",
        "raw = piece * self.std + self.mean",
        "raw = piece + self.mean",
        (STRINGS,),
    ),
    Fault(
        "pyro_avrnn/data/sprites.py",
        "two actions change places",
        "for row in (2, 1, 3)",
        "for row in (1, 2, 3)",
        (STRINGS,),
    ),
    Fault(
        "pyro_avrnn/exchange.py",
        "what is redrawn is the guide's",
        "_emitted(model.rollout(guide, x, mask, z=own.z, f=drawn), mask, mean)",
        "_emitted(model.rollout(guide, x, mask, z=own.z, f=own.f), mask, mean)",
        (JUDGES,),
    ),
    Fault(
        "pyro_avrnn/msd.py",
        "channels are copied instead of exchanged",
        "one[..., chosen], other[..., chosen] = second[..., chosen], first[..., chosen]",
        "one[..., chosen] = second[..., chosen]",
        (JUDGES,),
    ),
]
