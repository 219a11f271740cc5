"""How a request names its adapter."""

import pytest

from mlx_optiq_ext.serve.names import name_adapter
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.status import ServedModel


def _served(name: str, *adapters: str, aliases: tuple[str, ...] = ()) -> ServedModel:
    return ServedModel(
        id=name, aliases=aliases, source=name, loaded=True, created=0, context=1, adapters=adapters
    )


MODELS = (_served("small", "sql", aliases=("me@home", "poems")), _served("large@v2", "sql", "poems", "c"))


@pytest.mark.parametrize(
    ("named", "model", "adapter"),
    [
        ("small", "small", None),
        ("small@sql", "small", "sql"),
        ("small@sql+poems", "small", "sql+poems"),
        ("large@v2", "large@v2", None),
        ("large@v2@c", "large@v2", "c"),
        ("me@home", "me@home", None),
        ("me@home@sql", "me@home", "sql"),
        ("sql", "small", "sql"),
        ("c", "large@v2", "c"),
        ("poems", "poems", None),
        ("sql+poems", "small", "sql+poems"),
        ("c+unknown", "large@v2", "c+unknown"),
        ("gpt-4o", "gpt-4o", None),
        ("x+y", "x+y", None),
    ],
)
def test_a_name_says_model_and_adapter(named: str, model: str, adapter: str | None) -> None:
    found = name_adapter(Generation(model=named, prompt="x"), MODELS)
    assert (found.model, found.adapter) == (model, adapter)


def test_its_own_field_counts_before_the_name() -> None:
    asked = Generation(model="small@sql", adapter="poems", prompt="x")
    assert name_adapter(asked, MODELS) is asked
