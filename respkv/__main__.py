"""``python -m respkv``: the command line."""

from respkv.cli import main

if __name__ == "__main__":
    main(prog_name="respkv")
