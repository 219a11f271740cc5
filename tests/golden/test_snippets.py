"""What `optiq snippet` shows of every client; `python tests/golden/test_snippets.py` writes it anew."""

import sys
from pathlib import Path

import pytest

from mlx_optiq_ext.cli.commands.snippet import shown_text
from mlx_optiq_integrations.client import Client, all_clients
from mlx_optiq_integrations.facts import ClientFacts
from mlx_optiq_integrations.shown import show_client

FOLDER = Path(__file__).parent / "snippets"
PLAIN = ClientFacts(url="http://127.0.0.1:8080", model="org/Small-4bit", context=32_768, max_output=8_192)
ABLE = ClientFacts(
    url="https://studio.local:8443",
    model="Able@style",
    context=131_072,
    max_output=16_384,
    sees_images=True,
    thinks=True,
    api_key="secret",
    needs_key=True,
)


def texts(client: Client) -> str:
    shown = [shown_text(show_client(client, facts, {}, Path("/home/me"))) for facts in (PLAIN, ABLE)]
    return "\n\n══════════\n\n".join(shown) + "\n"


@pytest.mark.parametrize("client", all_clients().values(), ids=lambda client: client.name)
def test_snippets_are_as_recorded(client: Client) -> None:
    assert (FOLDER / f"{client.name}.txt").read_text("utf-8") == texts(client)


def test_no_snippet_of_a_client_that_is_gone() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(all_clients())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in all_clients().values():
        (FOLDER / f"{each.name}.txt").write_text(texts(each), encoding="utf-8")
    sys.exit(0)
