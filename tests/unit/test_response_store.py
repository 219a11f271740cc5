"""Stored responses: chains, limits, and what is forgotten."""

from typing import Any

import msgspec
import pytest

from mlx_optiq_ext.errors import RequestError, UnknownName
from mlx_optiq_ext.serve.responses.items import normalized, resolved
from mlx_optiq_ext.serve.responses.pages import page_of
from mlx_optiq_ext.serve.responses.schema import ContentPart, Item
from mlx_optiq_ext.serve.responses.store import ResponseStore


def response(name: str, text: str, previous: str | None = None) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    item = {"type": "message", "id": f"msg_{name}", "status": "completed", "role": "assistant"}
    return {"id": name, "previous_response_id": previous, "output": [{**item, "content": [part]}]}


def words(items: list[Item]) -> list[str | None]:
    return [part.text for item in items for part in item.content or () if isinstance(part, ContentPart)]


def test_a_chain_is_all_of_its_items_in_order() -> None:
    store = ResponseStore()
    store.put(response("a", "two"), normalized("one"))
    store.put(response("b", "four", "a"), normalized("three"))
    assert words(store.items_before("b")) == ["one", "two", "three", "four"]
    assert words(store.items_before("a")) == ["one", "two"]
    assert store.items_before(None) == []


def test_what_is_stored_counts_in_bytes_and_is_given_back_when_forgotten() -> None:
    store = ResponseStore()
    store.put(response("a", "two"), normalized("one"))
    assert store.nbytes == store.get("a").nbytes == len(store.get("a").input) + len(store.get("a").response)
    store.delete("a")
    assert (len(store), store.nbytes) == (0, 0)
    for forget in (store.get, store.delete, store.items_before, store.item):
        with pytest.raises(UnknownName):
            forget("a")


def test_the_one_used_longest_ago_makes_room() -> None:
    store = ResponseStore(max_responses=2)
    store.put(response("a", "x"), [])
    store.put(response("b", "x"), [])
    store.get("a")
    store.put(response("c", "x"), [])
    assert len(store) == 2
    assert [store.get(name).id for name in ("a", "c")] == ["a", "c"]
    with pytest.raises(UnknownName):
        store.get("b")


def test_bytes_are_a_limit_too() -> None:
    one = len(msgspec.json.encode(response("a", "x" * 1000)))
    store = ResponseStore(max_nbytes=2 * one + 100)
    for name in "abcde":
        store.put(response(name, "x" * 1000), [])
    assert len(store) == 2
    assert store.nbytes <= 2 * one + 100
    store.put(response("f", "x" * 5000), [])
    assert (len(store), store.nbytes) == (0, 0)


def test_a_chain_with_a_gap_is_refused() -> None:
    store = ResponseStore()
    store.put(response("a", "two"), [])
    store.put(response("b", "four", "a"), [])
    store.delete("a")
    with pytest.raises(UnknownName, match="send the whole conversation") as caught:
        store.items_before("b")
    assert caught.value.param == "previous_response_id"


def test_a_reference_is_the_item_itself() -> None:
    store = ResponseStore()
    store.put(response("a", "two"), normalized("one"))
    assert words(resolved(normalized([Item(id="msg_a")]), store.item)) == ["two"]


def test_items_get_a_kind_an_id_and_parts() -> None:
    (item,) = normalized("hi")
    assert item.id is not None
    assert item.id.startswith("msg_")
    assert msgspec.structs.replace(item, id=None) == Item(
        type="message",
        role="user",
        status="completed",
        content=[ContentPart(type="input_text", text="hi")],
    )
    kept = Item(type="message", role="assistant", id="mine", content="hi")
    assert normalized([kept])[0].id == "mine"
    assert normalized([kept])[0].content == [ContentPart(type="output_text", text="hi")]


def test_pages_go_on_where_the_last_one_ended() -> None:
    items = [Item(type="message", id=str(number)) for number in range(5)]

    def ids(**query: str) -> list[str | None]:
        return [item.id for item in page_of(items, query)["data"]]

    assert ids() == ["4", "3", "2", "1", "0"]
    assert ids(order="asc", limit="2") == ["0", "1"]
    assert ids(order="asc", limit="2", after="1") == ["2", "3"]
    first = page_of(items, {"limit": "5"})
    assert (first["first_id"], first["last_id"], first["has_more"]) == ("4", "0", False)
    assert page_of(items, {"limit": "4"})["has_more"]


@pytest.mark.parametrize(
    "query", [{"limit": "0"}, {"limit": "x"}, {"limit": "²"}, {"order": "up"}, {"after": "9"}]
)
def test_a_page_that_is_none_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        page_of([Item(type="message", id="1")], query)
    assert caught.value.param == next(iter(query))
