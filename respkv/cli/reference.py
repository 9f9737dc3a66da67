"""docs/config.md, made from the settings: ``python -m respkv.cli.reference > docs/config.md``."""

import sys

from respkv.config import FIXED, SETTINGS, Setting

_HEAD = """\
# Settings

<!-- Made by `python -m respkv.cli.reference`; change respkv/config/__init__.py instead. -->

A TOML file (`respkv serve --config respkv.toml`) holds them at its top level:

```toml
port = 7379
maxmemory = "1gb"
maxmemory-policy = "s3fifo"
protected-mode = true
```

`respkv serve --set name=value` sets any of them and wins over the file. `CONFIG GET` shows all of
them, `CONFIG SET` changes those marked *live* while the server runs. Sizes are bytes or carry a unit
in any case, as in Redis: `k`, `m`, `g`, `t` are powers of 1000, `kb`, `mb`, `gb`, `tb` of 1024. A
wrong key or value stops the server at its start with one line that names it, and exit code 2.

| setting | default | accepted | | meaning |
|---|---|---|---|---|
"""

_TAIL = """
What clients ask of a Redis and has one fixed answer here, `CONFIG GET` only:
"""


def page() -> str:
    """Return docs/config.md."""
    rows = "".join(f"{_row(setting)}\n" for setting in SETTINGS.values())
    fixed = ", ".join(f'`{name}` "{text}"' for name, text in FIXED.items())
    return f"{_HEAD}{rows}{_TAIL}{fixed}.\n"


def _row(setting: Setting) -> str:
    kind = setting.kind
    default = f"`{setting.default_text}`" if setting.default_text else "empty"
    live = "live" if kind.runtime else ""
    return f"| `{setting.name}` | {default} | {kind.accepted} | {live} | {kind.about} |"


if __name__ == "__main__":
    sys.stdout.write(page())
