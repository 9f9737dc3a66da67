"""Whatever the arguments, each command gets exactly one well-formed reply, and the next is in step.

So no CR or LF of a client ends a line of ours (RESP injection), no handler answers twice or not at
all, and none lets an exception out. A raw connection holds every reply against RESP's grammar.
"""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from respkv.wire.commands import COMMANDS, Command
from tests.server.conftest import Connect
from tests.server.raw import Raw, request
from tests.server.test_authentication import spellings
from tests.server_process import ServerProcess

# These change whether, or in which protocol, what follows is answered; others test them.
APART = {
    *("quit", "shutdown", "client|reply", "client|kill", "hello", "reset", "auth", "config|set"),
    *("subscribe", "unsubscribe", "psubscribe", "punsubscribe"),
}


def leaves() -> list[Command]:
    """Return every command that can be called, subcommands for those that have some."""
    rows = [
        row
        for command in COMMANDS.values()
        for row in (list(command.subcommands.values()) or [command])
    ]
    return [row for row in rows if row.name not in APART]


NASTY = st.one_of(
    st.sampled_from(
        [
            b"\r\n+OK\r\n",
            b"a\r\n:1\r\n",
            b"\n",
            b"\r",
            b"k\r\n$5\r\nhello\r\n",
            b"\xff\xfe\x00\r\n",
            b"",
            b"%s%n{}",
            b"x" * 300 + b"\r\n-ERR y\r\n",
            b"1",
            b"0",
            b"-1",
            b"2",
            b"99999999999999999999",
            b"ns:" + b"ab" * 32,
            b"k",
        ]
    ),
    st.binary(max_size=12),
    st.sampled_from(
        b"LAYERS MS PX EX NX GET PARENT TOKENS PRIORITY MATCH COUNT TYPE HEADS DIM DTYPE float16 "
        b"SAMPLES FILTERBY ID".split()
    ),
)
LEAF = st.sampled_from(leaves())
# Hypothesis takes constants out of our own source, these too, which close the connection or are
# answered once for each argument.
CLOSING = {b"post", b"host:", b"quit", b"shutdown"} | {
    *(b"subscribe", b"unsubscribe", b"psubscribe", b"punsubscribe"),
}


@settings(max_examples=600, deadline=None)
@given(
    calls=st.lists(st.tuples(LEAF, st.lists(NASTY, max_size=8)), min_size=1, max_size=20),
    protocol=st.sampled_from([2, 3]),
)
def test_no_argument_breaks_out_of_its_reply(
    calls: list[tuple[Command, list[bytes]]], protocol: int, server: ServerProcess
) -> None:
    with Raw(server.connect()) as raw:
        raw.ask("HELLO", protocol)
        raw.raw_all([[*row.name.split("|"), *args] for row, args in calls])


@settings(max_examples=200, deadline=None)
@given(words=st.lists(NASTY, min_size=1, max_size=6).filter(lambda w: w[0].lower() not in CLOSING))
@example(words=[b"\r\n+OK\r\n", b"\r\n+OK\r\n"])
@example(words=[b"CLIENT", b"\r\n+OK\r\n"])
@example(words=[b"HELLO", b"\r\n+OK\r\n"])
@example(words=[b"HELLO", b"3", b"\r\n+OK\r\n"])
@example(words=[b"CONFIG", b"SET", b"\r\n+OK\r\n", b"\r\n+OK\r\n"])
@example(words=[b"CONFIG", b"SET", b"maxmemory", b"\r\n+OK\r\n"])
@example(words=[b"CONFIG", b"SET", b"maxmemory-policy", b"x\r\n+OK\r\n"])
@example(words=[b"EXPIRE", b"k", b"1", b"\r\n+OK\r\n"])
@example(words=[b"SET", b"k", b"v", b"\r\n+OK\r\n"])
@example(words=[b"KV.SCHEMA", b"SET", b"a\r\n:1\r\n"] + [b"LAYERS", b"1", b"HEADS", b"1"] * 2)
@example(words=[b"AUTH", b"\r\n+OK\r\n", b"\r\n"])
@example(words=[b"CLIENT", b"KILL", b"ID", b"\r\n+OK\r\n"])
@example(words=[b"CLIENT", b"KILL", b"USER", b"\r\n+OK\r\n"])
@example(words=[b"CLIENT", b"SETINFO", b"\r\n+OK\r\n", b"\r\n"])
def test_no_word_breaks_out_of_an_error(words: list[bytes], server: ServerProcess) -> None:
    with Raw(server.connect()) as raw:
        raw.raw_all([words])


def test_every_command_of_the_table_is_answered(server: ServerProcess) -> None:
    """With the least and with more arguments, in any spelling: no row without a handler."""
    padding = [
        "1",
        "1",
        "1",
        "LAYERS",
        "1",
        "HEADS",
        "1",
        "DIM",
        "1",
        "TOKENS",
        "1",
        "DTYPE",
        "int8",
    ]
    with Raw(server.connect()) as raw:
        for row in leaves():
            for name in spellings(row.name):
                words = name.split("|")
                least = abs(row.arity)
                calls = [[*words, *padding[: least - len(words)]], [*words, *padding[:5]], words]
                raw.raw_all(calls)


def test_names_that_a_client_gives_itself_stay_in_their_column(
    server: ServerProcess, connect: Connect
) -> None:
    raw, watcher = connect(), connect()
    for command in (
        ["CLIENT", "SETNAME"],
        ["CLIENT", "SETINFO", "LIB-NAME"],
        ["CLIENT", "SETINFO", "LIB-VER"],
    ):
        for name in (b"a b", b"a\nid=1", b"a\r\n", b"\xff", b"\x7f", b"tab\t"):
            assert raw.raw(*command, name).startswith(b"-ERR"), (command, name)
    assert raw.raw("HELLO", 3, "SETNAME", b"a\nid=1").startswith(b"-ERR")
    lines = watcher.ask("CLIENT", "LIST").splitlines()
    assert all(line.startswith(b"id=") for line in lines)


def test_keys_with_line_ends_come_back_as_they_are(server: ServerProcess, connect: Connect) -> None:
    raw = connect()
    raw.ask("FLUSHALL")
    key = b"\r\n+OK\r\n*1\r\n"
    raw.ask("SET", key, "v")
    assert raw.ask("KEYS", "*") == [key]
    assert raw.ask("SCAN", 0) == [b"0", [key]]
    assert raw.ask("RANDOMKEY") == key
    assert raw.ask("ECHO", key) == key
    assert raw.ask("PING", key) == key
    assert raw.ask("KV.INFO", key)[1] == key
    raw.socket.sendall(request("KV.EXPLAIN", key) + request("PING"))
    assert raw.next()[0] == b"present"
    assert raw.next() == b"PONG"
