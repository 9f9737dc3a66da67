"""Write docs/commands.md: ``python -m respkv.wire.commands docs/commands.md``."""

import sys
from pathlib import Path

from respkv.wire.commands.markdown import commands_markdown

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(commands_markdown(), encoding="utf-8")
