"""The load checks what it moves."""

import pytest

from bench.load import Load, Transfer, Values, WrongReplyError, command
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


def test_a_page_that_is_not_there_is_a_miss_and_nothing_is_left_unread(
    server: ServerProcess,
) -> None:
    values = Values(NBYTES, 1, prefix="test-page:")
    page = bytearray(NBYTES)
    request = command("KV.GET", "test-page:none") + command("KV.GET", values.keys[0])
    with Load(server.unixsocket) as load:
        Transfer(load, values, put="KV.PUT").put_all()
        load.send([request], len(request))
        assert not load.receive_page(page)
        assert load.receive_page(page)
        assert page == values.payloads[0]
        assert load.ask("PING") == b"+PONG"


def test_a_page_of_another_size_is_noticed(server: ServerProcess) -> None:
    values = Values(NBYTES, 1, prefix="test-size:")
    with Load(server.unixsocket) as load:
        Transfer(load, values).put_all()
        request = command("GET", values.keys[0])
        load.send([request], len(request))
        with pytest.raises(WrongReplyError, match="framed"):
            load.receive_page(bytearray(NBYTES - 1))


def test_a_bulk_that_comes_in_pieces_is_received_whole(server: ServerProcess) -> None:
    with Load(server.unixsocket) as load:
        text = b"line\r\n" * 100_000
        assert load.ask("SET", "test-bulk", text) == b"+OK"
        assert load.ask_bulk("GET", "test-bulk") == text
        with pytest.raises(WrongReplyError, match="PONG"):
            load.ask_bulk("PING")
