"""How a request names an adapter: by its own field, as ``model@adapter``, or in place of the model.

Knows what is served by name only; which model an unknown name means is the engine's business.
"""

from collections.abc import Iterable

import msgspec

from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.status import ServedModel

__all__ = ["name_adapter"]


def name_adapter(request: Generation, models: Iterable[ServedModel]) -> Generation:
    """Take the adapter out of the model's name where the request names none by itself.

    A model whose own name or alias has an ``@`` keeps it; an adapter's name alone, or a sum ``a+b`` with
    it, means the first model that has it.
    """
    models = tuple(models)
    known = {name for model in models for name in (model.id, *model.aliases)}
    if request.adapter is not None or request.model in known:
        return request
    name, at, adapter = request.model.rpartition("@")
    if at:
        return msgspec.structs.replace(request, model=name, adapter=adapter or None)
    parts = set(request.model.split("+"))
    for model in models:
        if parts.intersection(model.adapters):
            return msgspec.structs.replace(request, model=model.id, adapter=request.model)
    return request
