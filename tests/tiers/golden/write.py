"""Write the golden directories of this format version: python -m tests.tiers.golden.write

Run once when FORMAT_VERSION grows, and commit what it makes beside what is there. A directory of an
older version is never written again: that it can still be read is what test_golden.py checks.
"""

import json
from pathlib import Path

from respkv.kernels.lossless import CODECS, encode
from respkv.tiers.batch import Bury, Change
from respkv.tiers.format import hash64
from respkv.tiers.record import Level, Meta
from respkv.tiers.superblock import FORMAT_VERSION
from tests.tiers.small_log import Given, SmallLog, page_key

HERE = Path(__file__).parent
EXPIRES_MS = 4_000_000_000_000
Payloads = dict[bytes, bytes]


def bf16(count: int) -> bytes:
    """Numbers as in a page: the codec gains on them."""
    return b"".join(bytes((number * 37 % 256, 0x3F)) for number in range(count))


def described(key: bytes, kind: str, payload: bytes, generation: int, **more: object) -> Meta:
    assert kind in ("string", "kvpage")
    return Meta(key, kind, len(payload), hash64(payload), generation)._replace(**more)  # type: ignore[arg-type]


def pages(first: int, count: int, payloads: Payloads, *, codec: int = 0) -> list[Given]:
    """A chain of pages, with all that may be said about one."""
    made: list[Given] = []
    for number in range(first, first + count):
        payload = bf16(300 + number)
        meta = described(
            page_key(number),
            "kvpage",
            payload,
            number,
            level=Level(number % 3),
            expires_ms=EXPIRES_MS + number if number % 2 else 0,
            pinned_ms=EXPIRES_MS if number == 2 else 0,
            touched_ms=1_700_000_000_000 + number,
            priority=-number,
            tokens=16,
            hits=number * 10,
            parent=page_key(number - 1) if number > 1 else b"",
            more=bytes(range(number * 20)) if number != 4 else b"",
        )
        payloads[meta.key] = payload
        stored = (
            encode(memoryview(payload), element_bytes=2, codec="zstd") if codec else (0, payload)
        )
        made.append(Given(meta, payload, stored[0], bytes(stored[1])))
    return made


def strings(payloads: Payloads) -> list[Given]:
    """Ordinary values of each level, an empty one and one with a key of any bytes among them."""
    made: list[Given] = []
    cases = [
        (b"plain", b"value", Level.DURABLE),
        (b"empty", b"", Level.DURABLE),
        (bytes(range(256)), b"\r\n\0\xff", Level.WRITTEN),
        (b"memory", b"gone after a crash", Level.MEMORY),
        (b"buried", b"gone", Level.DURABLE),
        (b"overwritten", b"older", Level.DURABLE),
    ]
    for generation, (key, payload, level) in enumerate(cases, 100):
        payloads[key] = payload
        made.append(Given(described(key, "string", payload, generation, level=level), payload))
    return made


def fill(log: SmallLog, payloads: Payloads, *, codec: int) -> None:
    """A checkpoint in the middle, and all kinds of notes behind it."""
    log.batch(pages(1, 4, payloads, codec=codec))
    log.batch(strings(payloads))
    log.checkpoint("checkpoint.b")
    log.open_segment()
    log.batch(pages(5, 2, payloads, codec=codec))
    newer = described(b"overwritten", "string", b"newer", 200, level=Level.DURABLE)
    payloads[b"overwritten"] = b"newer"
    log.batch([Given(newer, b"newer")], [Bury(b"overwritten", 105), Bury(b"buried", 104)])
    changed = log.live[b"plain"][0]._replace(expires_ms=EXPIRES_MS, priority=9)
    log.batch(notes=[Change(changed)])


def save(log: SmallLog, name: str, payloads: Payloads, keys: list[bytes]) -> None:
    """Write the files, and beside them what a reader must find."""
    folder = HERE / name
    folder.mkdir()
    for file, data in log.files.items():
        (folder / file).write_bytes(data)
    expected = {
        key.hex(): {**log.live[key][0]._asdict(), "payload": payloads[key].hex()} for key in keys
    }
    for fields in expected.values():
        fields.update({name: fields[name].hex() for name in ("key", "parent", "more")})
    (HERE / f"{name}.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    """Write one directory that was left by a crash, and one that was left by a clean stop."""
    payloads: Payloads = {}
    log = SmallLog("nvme", 4096, 32768)
    fill(log, payloads, codec=0)
    save(log, f"v{FORMAT_VERSION}-nvme", payloads, [key for key in log.live if key != b"memory"])
    payloads = {}
    log = SmallLog("disk", 64, 8192)
    fill(log, payloads, codec=CODECS["zstd"])
    log.stop()
    save(log, f"v{FORMAT_VERSION}-disk", payloads, list(log.live))


if __name__ == "__main__":
    main()
