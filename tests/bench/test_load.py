"""The load checks what it moves."""

import pytest

from bench.load import Load, Transfer, Values, WrongReplyError
from tests.server_process import ServerProcess

NBYTES = 100_000


@pytest.mark.parametrize(("put", "get"), [("SET", "GET"), ("KV.PUT", "KV.GET")])
def test_what_was_put_comes_back(server: ServerProcess, put: str, get: str) -> None:
    values = Values(NBYTES, 3, prefix=f"test-{put}:")
    for address in (server.unixsocket, ("127.0.0.1", server.port)):
        with Load(address) as load:
            transfer = Transfer(load, values, put=put, get=get)
            assert transfer.put(7) > 0
            assert transfer.get(7) > 0
            transfer.check_all()


@pytest.mark.parametrize("place", [0, NBYTES // 2, NBYTES - 1])
def test_one_changed_byte_is_noticed(server: ServerProcess, place: int) -> None:
    values = Values(NBYTES, 2, prefix="test-changed:")
    with Load(server.unixsocket) as load:
        transfer = Transfer(load, values)
        transfer.put_all()
        changed = bytearray(values.payloads[1])
        changed[place] ^= 1
        assert load.ask("SET", values.keys[1], bytes(changed)) == b"+OK"
        transfer.get(1)
        with pytest.raises(WrongReplyError, match="value 1"):
            transfer.get(2)
        with pytest.raises(WrongReplyError, match="value 1"):
            transfer.check_all()


def test_an_error_reply_is_noticed(server: ServerProcess) -> None:
    with Load(server.unixsocket) as load:
        values = Values(NBYTES, 1, prefix="test-error:")
        with pytest.raises(WrongReplyError, match="-ERR"):
            Transfer(load, values, put="NOSUCHCOMMAND").put(1)
