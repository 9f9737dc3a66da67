"""Settings: every spelling, every refusal, and what CONFIG and people get to read."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.config import FIXED, RUNTIME, SETTINGS, Config
from respkv.config.events import Endpoint
from respkv.config.gpu import Device
from respkv.config.kinds import Choice, Count, Flag, Kind, Mode, size_bytes, size_text
from respkv.engine.eviction import POLICIES
from respkv.errors import ConfigError

MIB = 1 << 20
UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1024,
    "m": 1000**2,
    "mb": 1024**2,
    "g": 1000**3,
    "gb": 1024**3,
    "t": 1000**4,
    "tb": 1024**4,
}


def refusal(text: str, tmp_path: Path) -> str:
    """Return the message for a file of this text, its folder cut off."""
    path = tmp_path / "respkv.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        Config.load(str(path))
    return str(raised.value).removeprefix(f"{tmp_path}/")


def loaded(text: str, tmp_path: Path) -> Config:
    path = tmp_path / "respkv.toml"
    path.write_text(text)
    return Config.load(str(path))


def examples(kind: Kind) -> list[str]:
    """Return a text at each edge of what a kind accepts."""
    match kind:
        case Flag():
            return ["yes", "no"]
        case Choice():
            return list(kind.words)
        case Count():
            return [str(kind.least), str(kind.most)]
        case Mode():
            return ["700", "777"]
        case Device():
            return ["cpu", "cuda", "cuda:0", "cuda:15"]
        case Endpoint():
            return ["", "tcp://*:5557", "@tcp://[::1]:*", "ipc:///tmp/events"]
        case _:
            return ["", "some text"]


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.booleans())
def test_a_size_means_what_redis_means_by_it(number: int, unit: str, capital: bool) -> None:
    text = f"{number}{unit.upper() if capital else unit}"
    assert size_bytes(text) == number * UNITS[unit]


@given(st.integers(0, 1 << 60))
def test_a_printed_size_reads_back(size: int) -> None:
    assert size_bytes(size_text(size)) == size


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_nothing(text: str) -> None:
    size = size_bytes(text)
    assert size is None or (size >= 0 and text[:1] in set("0123456789"))


@pytest.mark.parametrize(
    "text", ["", "gb", "1 gb", "-1", "+1", "1.5gb", "1kib", "0x10", "1e9", "٣"]
)
def test_what_is_not_a_size_is_none(text: str) -> None:
    assert size_bytes(text) is None


def test_a_size_of_many_digits_is_refused_before_it_is_computed() -> None:
    assert size_bytes("9" * 5000) is None


def test_the_defaults_need_no_file_and_pass_their_own_checks() -> None:
    config = Config.load()
    assert config == Config()
    assert (config.host, config.port, config.maxmemory) == ("127.0.0.1", 7379, 256 * MIB)
    for name, setting in SETTINGS.items():
        assert setting.kind.read(config.text(name)) == setting.default


def test_toml_gives_typed_values(tmp_path: Path) -> None:
    config = loaded(
        """
        port = 0
        maxmemory = "1gb"
        proto-max-bulk-len = 1048576
        protected-mode = false
        prefault = "no"
        maxmemory-policy = "s3fifo"
        unixsocket = "/run/respkv/sock"
        unixsocketperm = "770"
        shm = "ro"
        """,
        tmp_path,
    )
    assert (config.port, config.maxmemory, config.proto_max_bulk_len) == (0, 1 << 30, MIB)
    assert (config.protected_mode, config.prefault) == (False, False)
    assert (config.unixsocketperm, config.shm) == (0o770, "ro")


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "respkv.toml"
    path.write_text('port = 1\nmaxmemory = "2mb"\n')
    config = Config.load(str(path), {"port": "2", "PROTECTED-MODE": "no"})
    assert (config.port, config.maxmemory, config.protected_mode) == (2, 2 * MIB, False)


@pytest.mark.parametrize("policy", POLICIES)
def test_redis_names_of_policies_are_accepted(policy: str) -> None:
    config = Config().with_value("maxmemory-policy", f"allkeys-{policy}".upper())
    assert config.maxmemory_policy == policy


@pytest.mark.parametrize("name", Config.names())
def test_every_value_reads_back_as_config_get_prints_it(name: str) -> None:
    setting = SETTINGS[name]
    base = Config(
        unixsocket="/run/respkv",
        events_endpoint="tcp://*:5556",
        lease_default=1,
        lease_max=86_400_000,
        maxmemory=1 << 50,
        nvme_path="/mnt/nvme",
        nvme_bytes=1 << 50,
        disk_path="/mnt/disk",
        disk_bytes=1 << 50,
        dirty_low=0,
    )
    alone = {("unixsocket", ""), ("nvme-path", ""), ("disk-path", "")}
    alone |= {("nvme-bytes", "0"), ("disk-bytes", "0")}
    alone |= {("segment-bytes", str(1 << 50)), ("dirty-low", "100")}
    for text in examples(setting.kind):
        if (name, text) in alone:  # only with another one
            continue
        changed = base.with_value(name, text)
        assert changed.text(name) == text
        assert changed.with_value(name, changed.text(name)) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'maxmemory-policy = "lfru"',
            "maxmemory-policy = 'lfru': accepted are lru, lfu, fifo, sieve, s3fifo, arc, "
            "wtinylfu, gdsf, survival",
        ),
        (
            "maxmemory-policy = 3",
            "maxmemory-policy = 3: accepted are lru, lfu, fifo, sieve, s3fifo, arc, wtinylfu, "
            "gdsf, survival",
        ),
        ("port = 65536", "port = 65536: accepted are -1 to 65535"),
        ("port = true", "port = True: accepted are -1 to 65535"),
        ("port = 7379.0", "port = 7379.0: accepted are -1 to 65535"),
        ('timeout = "5s"', "timeout = '5s': accepted are 0 to 31536000 (seconds)"),
        ("lease-max = 0", "lease-max = 0: accepted are 1 to 86400000 (ms)"),
        (
            'maxmemory = "64k"',
            "maxmemory = '64k': accepted are 1mb to 1024tb, such as 65536, 64k, 512mb or 1gb",
        ),
        (
            'maxmemory = "1 gb"',
            "maxmemory = '1 gb': accepted are 1mb to 1024tb, such as 65536, 64k, 512mb or 1gb",
        ),
        ('prefault = "on"', "prefault = 'on': accepted are yes, no, true, false"),
        ("prefault = 1", "prefault = 1: accepted are yes, no, true, false"),
        ('shm = "yes"', "shm = 'yes': accepted are off, ro, rw"),
        ("host = 1", "host = 1: accepted are any text in quotes"),
        (
            "unixsocketperm = 0o700",
            'unixsocketperm = 448: accepted are three octal digits in quotes, such as "700"',
        ),
        (
            'maxmemory-polcy = "lru"',
            "'maxmemory-polcy': unknown key; did you mean maxmemory-policy?",
        ),
        ("max_args = 100", "'max_args': unknown key; did you mean max-args?"),
        (
            "lease-default = 70000",
            "lease-default = 70000: accepted are values up to lease-max, 60000",
        ),
        (
            'small-value-memory = "1gb"',
            "small-value-memory = 1073741824: accepted are values up to maxmemory, 268435456",
        ),
        ("port = -1", "port = -1: without TCP, unixsocket must be set"),
        (
            'nvme-path = "/mnt/nvme"',
            "nvme-path = '/mnt/nvme': it needs nvme-bytes, the most it may take",
        ),
        ('disk-bytes = "1tb"', "disk-bytes = 1099511627776: it needs disk-path, a directory"),
        (
            'nvme-path = "/mnt/nvme"\nnvme-bytes = "1mb"',
            "nvme-bytes = 1048576: accepted are values from 8mb on",
        ),
        (
            'nvme-path = "/mnt/a/"\nnvme-bytes = "1gb"\ndisk-path = "/mnt/./a"\ndisk-bytes = "1tb"',
            "disk-path = '/mnt/./a': it is nvme-path, too; every tier needs a directory of its own",
        ),
        (
            'nvme-path = "/mnt/a"\nnvme-bytes = "64mb"\nsegment-bytes = "32mb"',
            "segment-bytes = 33554432: accepted are values up to a quarter of nvme-bytes, 16777216",
        ),
        (
            'segment-bytes = "64kb"',
            "segment-bytes = 65536: accepted are 0, and values from 1mb on",
        ),
        ("dirty-low = 60", "dirty-low = 60: accepted are values up to dirty-high, 50"),
        (
            'durability = "durable"',
            "durability = 'durable': it needs a file tier; set nvme-path or disk-path",
        ),
        ("nvme-depth = 0", "nvme-depth = 0: accepted are 1 to 1024"),
        ('nvme-engine = "libaio"', "nvme-engine = 'libaio': accepted are auto, io_uring, threads"),
        ("[port]\nnumber = 1", "port = {'number': 1}: accepted are -1 to 65535"),
        (
            "port 1",
            "not a TOML file: Expected '=' after a key in a key/value pair (at line 1, column 6)",
        ),
    ],
)
def test_a_wrong_file_names_itself_the_key_the_value_and_what_is_accepted(
    text: str, message: str, tmp_path: Path
) -> None:
    assert refusal(text, tmp_path) == f"respkv.toml: {message}"


def test_a_key_like_no_other_lists_them_all(tmp_path: Path) -> None:
    message = refusal("xyzzy = 1", tmp_path)
    assert message == "respkv.toml: 'xyzzy': unknown key; docs/config.md has all that there are"


def test_the_command_line_is_named_as_such() -> None:
    with pytest.raises(
        ConfigError, match=r"^command line: port = 'http': accepted are -1 to 65535$"
    ):
        Config.load(None, {"port": "http"})


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: No such file or directory$"):
        Config.load(str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match=r": Is a directory$"):
        Config.load(str(tmp_path))
    (tmp_path / "latin1.toml").write_bytes(b'host = "\xe4"')
    with pytest.raises(ConfigError, match=r"latin1\.toml: not a TOML file: "):
        Config.load(str(tmp_path / "latin1.toml"))


def test_the_password_is_never_shown(tmp_path: Path) -> None:
    config = loaded('requirepass = "hunter2"', tmp_path)
    assert config.requirepass == config.text("requirepass") == "hunter2"
    assert "hunter2" not in repr(config)
    assert "hunter2" not in str(config.__rich_repr__())
    with pytest.raises(ConfigError) as raised:
        config.with_value("requirepass", "hunter2\0")
    assert "hunter2" not in str(raised.value)
    assert "5077" not in refusal("requirepass = 5077", tmp_path)


def test_a_change_leaves_the_old_config_alone() -> None:
    before = Config()
    after = before.with_value("maxmemory", "1gb")
    assert (before.maxmemory, after.maxmemory) == (256 * MIB, 1 << 30)


def test_values_that_only_go_together_are_set_together() -> None:
    changes = {"lease-default": "120000", "lease-max": "120000"}
    with pytest.raises(ConfigError, match="up to lease-max"):
        Config().with_value("lease-default", "120000")
    assert Config().with_values(changes).lease_default == 120_000


@given(st.sampled_from(Config.names()), st.text(max_size=20))
def test_any_text_is_a_value_or_a_config_error(name: str, text: str) -> None:
    try:
        changed = Config().with_value(name, text)
    except ConfigError as error:
        # Of values that do not go together, the error begins with the other one.
        assert name in str(error)  # noqa: PT017
    else:
        assert changed.with_value(name, changed.text(name)) == changed


def test_a_client_cannot_make_the_error_long_or_slow() -> None:
    with pytest.raises(ConfigError) as raised:
        Config().with_value("x" * 10_000_000, "1")
    assert len(str(raised.value)) < 1000
    with pytest.raises(ConfigError) as raised:
        Config().with_value("port", "x\r\n" * 10_000_000)
    assert len(str(raised.value)) < 1000
    assert "\n" not in str(raised.value)


def test_runtime_and_fixed_names_are_what_they_should_be() -> None:
    assert set(Config.names()) >= RUNTIME
    assert not FIXED.keys() & set(Config.names())
    fixed = {"port", "host", "unixsocket", "shm", "shm-path", "tcp-backlog", "hugepages"}
    for name in fixed | {"nvme-path", "nvme-bytes", "disk-path", "disk-bytes"}:
        assert name not in RUNTIME
    assert (FIXED["save"], FIXED["appendonly"], FIXED["databases"]) == ("", "no", "1")


def test_what_is_derived_follows_its_source() -> None:
    config = Config(maxmemory=64 * MIB)
    assert config.small_value_bytes() == 4 * MIB
    assert config.with_value("small-value-memory", "1mb").small_value_bytes() == MIB
    assert config.arena_path(7000) == "/dev/shm/respkv-7000.arena"
    assert config.with_value("shm-path", "/run/arena").arena_path(7000) == "/run/arena"


def test_the_file_tiers_are_listed_the_fastest_first() -> None:
    assert not Config().has_files
    disk = Config(disk_path="/mnt/disk", disk_bytes=1 << 40)
    assert disk.has_files
    assert list(disk.file_tiers()) == [("disk", "/mnt/disk", 1 << 40)]
    both = disk.with_values({"nvme-path": "/mnt/nvme", "nvme-bytes": "1gb"})
    assert [name for name, _, _ in both.file_tiers()] == ["nvme", "disk"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpu-bytes", "1048575"),
        ("gpu-device", ""),
        ("gpu-device", "cuda:"),
        ("gpu-device", "cuda:0:1"),
        ("gpu-device", "meta"),
        ("gpu-promote", "third"),
    ],
)
def test_a_gpu_tier_that_cannot_be_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = .*: accepted are "):
        Config().with_value(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("events-endpoint", "5557"),
        ("events-endpoint", "tcp://*"),
        ("events-endpoint", "udp://*:5557"),
        ("events-topic", "kv@{model}"),
        ("events-topic", "kv@{"),
        ("events-buffer", "0"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} = .*: accepted are "):
        Config().with_value(name, text)


def test_a_replay_goes_with_an_endpoint_and_is_bound() -> None:
    with pytest.raises(ConfigError, match="without events-endpoint there is nothing"):
        Config().with_value("events-replay-endpoint", "tcp://*:5558")
    published = Config().with_value("events-endpoint", ">tcp://indexer:5557")
    with pytest.raises(ConfigError, match="it is bound; leave out the >"):
        published.with_value("events-replay-endpoint", ">tcp://*:5558")
    assert published.with_value("events-replay-endpoint", "tcp://*:5558").events_buffer == 10_000


def test_namespaces_of_events_are_listed_by_commas() -> None:
    assert Config().event_namespaces() == ()
    config = Config().with_value("events-namespaces", "llama, qwen:7b,,")
    assert config.event_namespaces() == (b"llama", b"qwen:7b")


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        Config().port = 1  # type: ignore[misc]
