"""The run-time type checker that jaxtyping applies under pytest."""

from beartype import BeartypeConf, beartype

# An int is welcome where a float is annotated, as PEP 484 says.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
