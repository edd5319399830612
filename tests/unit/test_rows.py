"""Rows of a comparison: their notation, their objective, and the parts built from them."""

import pytest

from inference import ELBO, FIVO, IWAE
from pyro_avrnn import data
from pyro_avrnn.cli.parts import build
from pyro_avrnn.cli.rows import parse
from pyro_avrnn.cli.settings import Settings


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
