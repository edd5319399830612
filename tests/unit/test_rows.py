"""Rows of a comparison: their notation, their objective, and the parts built from them."""

from typing import Any

import pytest
from torch import Tensor

from inference import ELBO, FIVO, IWAE
from pyro_avrnn import data
from pyro_avrnn.cli.needs import lacking
from pyro_avrnn.cli.options import options_of
from pyro_avrnn.cli.parts import build
from pyro_avrnn.cli.rows import ROWS, parse, vary
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("rnn", "log-likelihood"),
        ("rnn:dropout=0.3", "log-likelihood"),
        ("elbo", "reconstruction - 1 KL"),
        ("elbo-annealed", "reconstruction - 0>1@0.5 KL"),
        ("iwae", "IWAE-4"),
        ("iwae:particles=16", "IWAE-16"),
        ("elbo:bound=iwae,particles=8", "IWAE-8"),
        ("fivo", "FIVO-4"),
        ("fivo:kl=0>1@0.5", "FIVO-4 with 0>1@0.5 KL"),
        ("fivo:kl=0.5,dropout=0.1", "FIVO-4 with 0.5 KL"),
        ("conditional", "reconstruction - 0 KL - 0>10@0.5 critic"),
        ("joint+kl:weight=2", "reconstruction - 0>1@0.5 KL - 2 critic"),
        ("joint+kl:bound=fivo,particles=2,kl=1", "FIVO-2 - 0>1@0.5 critic"),
        ("conditional:bound=iwae,particles=3", "IWAE-3 with 0 KL - 0>10@0.5 critic"),
        ("dsae", "reconstruction - 0>1@0.25 KL"),
        ("dsae+mi:free_bits=3", "reconstruction - 0>1@0.25 KL + 1 I(x; f), 3 free nats of f"),
        (
            "dsae+adversary:kl=1,kl_f=0.1,match=5,gamma=30",
            "reconstruction - 1 KL, KL of f times 0.1 - 5 MMD of f - 30 I(f; z)",
        ),
    ],
)
def test_a_rows_objective_in_words(text: str, objective: str) -> None:
    assert parse(text).objective == objective


def test_options_of_training_are_read() -> None:
    row = parse("iwae:particles=7,dropout=0.2,lr=0.01,weight_decay=1e-4")
    assert (row.bound, row.particles, row.dropout) == ("iwae", 7, 0.2)
    assert (row.lr, row.weight_decay) == (0.01, 1e-4)
    plain = parse("iwae")
    assert (plain.particles, plain.dropout, plain.lr, plain.weight_decay) == (4, 0.0, None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("elbo:bound=elbow", "bound must be one of elbo, iwae, fivo, got 'elbow'"),
        ("iwae:particles=4.5", "particles must be of kind int, got '4.5'"),
        ("iwae:dropout=half", "dropout must be of kind number, got 'half'"),
        ("iwae:lr=fast", "lr must be of kind number, got 'fast'"),
        ("iwae:weight_decay=", "weight_decay must be of kind number, got ''"),
    ],
)
def test_a_value_of_another_kind_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


@pytest.mark.parametrize(
    ("text", "kind", "particles"),
    [
        ("elbo", ELBO, 1),
        ("elbo:particles=3", ELBO, 3),
        ("iwae", IWAE, 4),
        ("fivo:particles=2", FIVO, 2),
        ("conditional:bound=iwae,particles=5", IWAE, 5),
        ("alternating:bound=fivo,particles=6", FIVO, 6),
    ],
)
def test_a_row_is_built_with_its_bound(text: str, kind: type, particles: int) -> None:
    parts = build(parse(text), data.vowels(), Settings(h_dim=4, z_dim=2))
    assert type(parts.objective) is kind and parts.objective.num_particles == particles
    has_critic = parts.adversarial is not None
    # the paper's second algorithm moves the critic's price to a step of its own
    assert list(parts.objective.penalties) == (
        [parts.adversarial] if has_critic and not text.startswith("alternating") else []
    )


@pytest.mark.parametrize("name", ["rnn", "elbo", "conditional", "alternating"])
def test_every_kind_of_row_takes_dropout(name: str) -> None:
    parts = build(parse(f"{name}:dropout=0.3"), data.vowels(), Settings(h_dim=4, z_dim=2))
    assert parts.recipe.config["dropout"] == parts.recipe.model.encode_x.dropout == 0.3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iwae:particles=0", "option particles must be at least 1, got 0"),
        ("elbo:dropout=1", r"option dropout must be in \[0, 1\), got 1"),
    ],
)
def test_a_number_out_of_range_is_refused_when_built(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(parse(text), data.vowels(), Settings(h_dim=4, z_dim=2))


@pytest.mark.parametrize(
    ("text", "option", "needs"),
    [
        ("rnn:kl=0", "kl", "a model with latents"),
        ("rnn:z_dim=4", "z_dim", "a model with latents"),
        ("elbo:prior_gradient=false", "prior_gradient", "guide=residual"),
        ("elbo:view=joint", "view", "a row that compares codes with draws of the prior"),
        ("refined:divergence=kl", "divergence", "a row that compares codes"),
        ("elbo:pairing=free_runs", "pairing", "a row with a penalty"),
        ("alternating:weight=3", "weight", "a row with a penalty"),
        ("conditional:divergence=mmd,critic=lstm", "critic", "a row with a critic"),
        ("conditional:divergence=mmd,watch=true", "watch", "a row with a critic"),
        ("joint:divergence=kl,on=all", "on", "a critic with constraint=spectral or gradient_pen"),
        ("alternating:on=z", "on", "a critic with constraint=spectral or gradient_penalty"),
        ("joint:strength=3", "strength", "constraint=gradient_penalty or clip"),
        ("fivo:critic_lr=0.1", "critic_lr", "a critic that learns in the training"),
        ("refined:critic_steps=1", "critic_steps", "a critic that learns in the training"),
        ("iwae:critic_dim=8", "critic_dim", "a row with a critic, such as conditional or refined"),
        ("conditional:candidates=4", "candidates", "the row refined"),
        ("refined:begin=0.5", "begin", "the row refined with stage=loop"),
        ("elbo:contrast=prior", "contrast", "the row avb"),
        ("conditional:adversarial_lr=0.1", "adversarial_lr", "the row alternating"),
        ("elbo:width=16", "width", "emission=autoregressive"),
        ("elbo:emission=mixture,components=3", "components", "emission=logistic or autoregress"),
    ],
)
def test_an_option_without_effect_is_refused(text: str, option: str, needs: str) -> None:
    with pytest.raises(ValueError, match=f"option {option} does not go with row '{text}': it nee"):
        parse(text)
    with pytest.raises(ValueError, match=needs):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "alternating:adversarial_lr=0.001,detach_state=false,divergence=kl,standardise=true",
        "alternating:strength=0.02,critic_lr=0.001,prior_gradient=true",
        "elbo:guide=smoothing_residual,prior_gradient=false",
        "joint:divergence=kl,constraint=spectral,on=all",
        "avb:contrast=prior,critic_dim=8,critic_lr=0.01,critic_steps=3,kl=1",
        "conditional:constraint=gradient_penalty,strength=2,on=all,watch=true,pairing=free_runs",
        "conditional:divergence=mmd,standardise=true,weight=3",
        "elbo:emission=autoregressive,width=8,lags=3,guide=residual,prior_gradient=false",
        "fivo:twist=true,critic_dim=8,critic_lr=0.01,critic_steps=1",
        "marginal:view=joint,critic=lstm,constraint=clip,strength=0.1",
        "refined:stage=loop,begin=0.5,candidates=4,refine_steps=10,critic_lr=0.01,critic_steps=1",
        "refined:critic_dim=8,z_dim=3,guide=smoothing,prior=flow,bound=iwae,particles=3",
    ],
)
def test_an_option_with_an_effect_is_taken(text: str) -> None:
    assert parse(text).label == text


def test_every_option_is_refused_somewhere_or_has_an_effect_everywhere() -> None:
    rows = [*ROWS.values(), parse("elbo:emission=mixture")]
    always = [n for n in options_of(Training) if not any(lacking(row, n) for row in rows)]
    assert always == [
        *("model", "h_dim", "emission", "dropout", "activation", "batch_size"),
        *("batches", "lr", "lr_decay", "weight_decay", "clip_norm", "average", "cell", "features"),
    ]


#: another value of each option that some row refuses; what needs a whole run to show is left out
OTHER = {
    "kl": "0.3",
    "guide": "smoothing",
    "prior": "mixture",
    "prior_gradient": "false",
    "divergence": "pearson",
    "standardise": "true",
    "weight": "0.7",
    "pairing": "free_runs",
    "critic": "lstm",
    "constraint": "gradient_penalty",
    "watch": "true",
    "critic_steps": "5",
    "critic_lr": "0.05",
    "on": "all",
    "strength": "0.5",
    "critic_dim": "7",
    "candidates": "5",
    "begin": "0.5",
    "contrast": "prior",
    "adversarial_lr": "0.5",
    "detach_state": "false",
    "width": "9",
    "lags": "3",
}


#: held and never used, as this critic is no penalty, or refused by other rows of its kind
EXEMPT = {("alternating", "weight"), ("alternating", "pairing")}


def told(thing: Any, seen: dict[int, Any]) -> Any:
    """All that an object holds, tensors by their shapes, each object once."""
    if isinstance(thing, bool | int | float | str | None):
        return thing
    if isinstance(thing, Tensor):
        return tuple(thing.shape)
    if id(thing) in seen:
        return type(thing).__name__
    seen[id(thing)] = thing  # alive, so that no other object comes to have its identity
    if isinstance(thing, dict):
        return {str(name): told(inner, seen) for name, inner in thing.items()}
    if isinstance(thing, list | tuple):
        return [told(inner, seen) for inner in thing]
    inside = getattr(thing, "__dict__", {})
    cells = [c.cell_contents for c in getattr(thing, "__closure__", None) or ()]
    return [type(thing).__name__, told(inside, seen), told(cells, seen)]


def parts_of(row: Training) -> Any:
    """What a row is built of, but for the record of what was given."""
    parts = build(row, data.vowels(), Settings(h_dim=4, z_dim=2))
    parts.recipe.config.clear()
    return told(parts, {})


@pytest.mark.parametrize(
    "text",
    [
        *("elbo-annealed", "fivo", "twisted", "refined", "refined:stage=loop", "avb"),
        *("alternating", "conditional", "joint:divergence=mmd", "joint:divergence=kl"),
        *("joint:constraint=clip", "joint:constraint=gradient_penalty"),
        *("elbo:guide=smoothing_residual", "elbo:emission=autoregressive", "elbo:model=dsae"),
    ],
)
def test_what_is_refused_would_change_nothing_that_is_built(text: str) -> None:
    row = parse(text)
    expected = parts_of(row)
    assert parts_of(row) == expected
    for name, value in OTHER.items():
        if lacking(row, name) and (text, name) not in EXEMPT:
            assert parts_of(vary(row, f"{name}={value}")) == expected, name


def test_a_row_of_a_dsae_is_built_as_it_says() -> None:
    text = "dsae+adversary:kl_f=0>0.5@0.5,match=5,alpha=2,free_bits=3,information=club,reads=step"
    row = parse(f"{text},normalise=true,segment=0.3-0.7,f_dim=6,detach_f=false,watch=true")
    parts = build(row, data.vowels(), Settings(z_dim=2, h_dim=4, compile=True))
    guide: Any = parts.recipe.guide
    assert (guide.normalise, guide.segment) == (True, (0.3, 0.7))
    assert parts.recipe.model.f_dim == 6
    assert isinstance(parts.objective, ELBO)
    assert callable(parts.objective.kl_f_weight)
    names = [penalty.name for penalty in parts.objective.penalties]
    assert names == ["global_information", "free_bits", "global_matching", "critic"]
    assert parts.objective.penalties[0].weight == 2.0
    adversarial = parts.adversarial
    assert adversarial is not None
    assert adversarial.role.name == "information"
    assert adversarial.critic.conditional
    assert adversarial.critic.of_z.encoder is None  # single steps
    plain = build(parse("dsae"), data.vowels(), Settings(z_dim=2, h_dim=4))
    assert (plain.adversarial, plain.recipe.critic, plain.hooks) == (None, None, ())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("elbo:gamma=3", "gamma does not go with row .* it needs a row such as dsae"),
        ("elbo:alpha=3", "alpha does not go with row .* it needs a row such as dsae"),
        ("dsae:gamma=3", "it needs a row such as dsae, with information=infonce"),
        ("elbo:f_dim=3", "it needs model=dsae"),
        ("dsae:information=mine", "information must be one of density_ratio"),
        ("dsae:free_bits=-1", "free_bits must be at least 0"),
    ],
)
def test_options_of_f_go_with_a_dsae(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dsae:segment=0.7-0.3", "segment must be two shares of a sequence in order"),
        ("dsae:segment=half", "option segment must be two shares of a sequence such as 0.3-0.7"),
        ("dsae:model=vrnn,f_dim=16", "it needs model=dsae"),
        ("dsae:bound=iwae", "needs model=dsae and bound=elbo"),
        ("dsae+mi:alpha=-1", "weight must be at least 0"),
        ("dsae+adversary:gamma=-1", "weight must be at least 0"),
    ],
)
def test_parts_of_a_dsae_are_checked(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(parse(text), data.vowels(), Settings(z_dim=2, h_dim=4))
