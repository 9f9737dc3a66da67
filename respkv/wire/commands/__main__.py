"""Print docs/commands.md: ``python -m respkv.wire.commands > docs/commands.md``."""

from respkv.wire.commands.markdown import commands_markdown

if __name__ == "__main__":
    print(commands_markdown(), end="")
