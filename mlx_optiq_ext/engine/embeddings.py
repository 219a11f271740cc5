"""A request for embeddings: its inputs checked, its caches claimed in the memory budget, its pieces queued.

Knows no HTTP. Called by ``engine`` on the prompt thread; what it queues runs on the owner thread.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import Future

from mlx_optiq_ext.engine.budget import Budget
from mlx_optiq_ext.engine.embed import embed_in_pieces, groups
from mlx_optiq_ext.engine.owner import Owner
from mlx_optiq_ext.engine.pieces import run_in_pieces
from mlx_optiq_ext.engine.served import Loaded
from mlx_optiq_ext.errors import PromptTooLong
from mlx_optiq_ext.types.port import Embeddings

__all__ = ["embed_inputs"]


def embed_inputs(
    owner: Owner, loaded: Loaded, inputs: Sequence[str | Sequence[int]], future: "Future[Embeddings]"
) -> None:
    """Give a future one unit vector per text or tokens; what goes wrong later is given to it too.

    Raises:
        RequestError, PromptTooLong: An input is empty, unknown to the model or longer than its context.
    """
    rows = [loaded.tokenizer.encode(each) if isinstance(each, str) else each for each in inputs]
    for index, tokens in enumerate(rows):
        if len(tokens) > loaded.context:
            raise PromptTooLong(len(tokens), loaded.context)
        loaded.check_tokens(tokens, f"input[{index}]")
    run_in_pieces(owner, loaded.spec, _embedded(owner.budget, loaded, rows), future)


def _embedded(budget: Budget, loaded: Loaded, rows: list[Sequence[int]]) -> Generator[None, None, Embeddings]:
    lengths = [len(tokens) for tokens in rows]
    padded = [(len(group), max(lengths[index] for index in group)) for group in groups(lengths)]
    most = max((count * loaded.plain_sizes.nbytes(longest) for count, longest in padded), default=0)
    with budget.claimed(most):
        vectors = yield from embed_in_pieces(loaded.model, rows)
    return Embeddings(model=loaded.spec.name, vectors=vectors, prompt_tokens=sum(lengths))
