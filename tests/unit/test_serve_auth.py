"""Who is let in: keys, host names, origins."""

import pytest

from mlx_optiq_ext.errors import Forbidden, RequestError, Unauthorized, UsageError
from mlx_optiq_ext.serve.auth import Doors, is_loopback, require_key_for

HOST = (b"host", b"127.0.0.1:8080")


def _check(doors: Doors, *headers: tuple[bytes, bytes], path: str = "/v1/models") -> str:
    try:
        doors.check(
            path, [HOST, *headers] if not any(h[0] == b"host" for h in headers) else headers, "127.0.0.1"
        )
    except RequestError as error:
        return type(error).__name__
    return "in"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST.", "::1", "[::1]", "127.8.9.1", "a.localhost"]
)
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    require_key_for(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.org", "localhost.example.org"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="OPTIQ_API_KEY"):
        require_key_for(host, None)
    require_key_for(host, "key")


@pytest.mark.parametrize(
    "header",
    [(b"authorization", b"Bearer secret"), (b"authorization", b"bearer  secret"), (b"x-api-key", b"secret")],
)
def test_key_is_taken_from_either_header(header: tuple[bytes, bytes]) -> None:
    assert _check(Doors(key="secret"), header) == "in"


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer secre"),
        (b"authorization", b"Basic secret"),
        (b"authorization", b"Bearer "),
        (b"x-api-key", b"\xff\xfe"),
        (b"x-api-key", b"secret2"),
        (b"cookie", b"secret"),
    ],
)
def test_other_keys_are_refused(header: tuple[bytes, bytes]) -> None:
    assert _check(Doors(key="secret"), header) == "Unauthorized"


def test_one_right_key_of_two_is_enough_and_health_needs_none() -> None:
    doors = Doors(key="sécret")
    assert _check(doors, (b"authorization", b"Bearer dummy"), (b"x-api-key", "sécret".encode())) == "in"
    assert _check(doors, path="/health") == "in"
    assert _check(doors, path="/metrics") == "Unauthorized"


def test_the_key_is_in_no_message() -> None:
    with pytest.raises(Unauthorized) as caught:
        Doors(key="secret").check("/v1/models", [HOST, (b"x-api-key", b"guess")], None)
    assert "secret" not in str(caught.value)
    assert "guess" not in str(caught.value)


def test_any_key_will_do_where_none_is_set() -> None:
    assert _check(Doors(), (b"authorization", b"Bearer whatever")) == "in"


@pytest.mark.parametrize(
    "host", [b"localhost:8080", b"[::1]:8080", b"127.0.0.1", b"box.lan:1", b"10.0.0.7:8080"]
)
def test_served_hosts(host: bytes) -> None:
    doors = Doors(hosts=("box.lan",))
    doors.check("/", [(b"host", host)], "10.0.0.7")


@pytest.mark.parametrize(
    "host", [b"evil.example", b"evil.example:8080", b"10.0.0.8", b"[", b"localhost.evil.org", b""]
)
def test_other_hosts_are_refused(host: bytes) -> None:
    assert _check(Doors(), (b"host", host)) == "Forbidden"


@pytest.mark.parametrize(
    "origin", [b"https://evil.example", b"null", b"", b"http://127.0.0.1:9999", b"file://"]
)
def test_other_origins_are_refused_for_every_path(origin: bytes) -> None:
    assert _check(Doors(), (b"origin", origin), path="/health") == "Forbidden"
    assert Doors().cors([HOST, (b"origin", origin)]) == []


def test_own_and_listed_origins_may_call() -> None:
    doors = Doors(origins=("https://chat.example",))
    assert _check(doors, (b"origin", b"http://127.0.0.1:8080")) == "in"
    assert _check(doors, (b"origin", b"https://chat.example")) == "in"
    assert dict(doors.cors([(b"origin", b"https://chat.example")]))[b"access-control-allow-origin"] == (
        b"https://chat.example"
    )
    assert doors.cors([(b"origin", b"http://127.0.0.1:8080")]) == []


def test_preflight_is_answered_without_a_key_for_listed_origins_only() -> None:
    asked = [
        HOST,
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"x-api-key"),
    ]
    doors = Doors(key="secret", origins=("https://chat.example",))
    answer = doors.preflight("OPTIONS", [*asked, (b"origin", b"https://chat.example")], None)
    assert answer is not None
    assert dict(answer)[b"access-control-allow-headers"] == b"x-api-key"
    with pytest.raises(Forbidden, match="evil"):
        doors.preflight("OPTIONS", [*asked, (b"origin", b"https://evil.example")], None)
    assert doors.preflight("POST", asked, None) is None
    assert doors.preflight("OPTIONS", [HOST], None) is None
