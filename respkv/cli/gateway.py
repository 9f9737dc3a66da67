"""``respkv gateway``: a model and its cache behind HTTP."""

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from respkv.cli.serve import pair_of
from respkv.config.kinds import Size
from respkv.errors import ConfigError

# What respkv[gateway] brings; what is looked for is the import, not the distribution.
EXTRA = ("fastapi", "uvicorn", "torch", "transformers", "tokenizers", "jinja2")
TOKEN_VARIABLE = "RESPKV_GATEWAY_TOKEN"
# Options of GatewaySettings: the field, its type, its default and what it is about. They stand here
# as well, so that --help needs nothing of the extra; a test compares the two.
SETTINGS: tuple[tuple[str, type, Any, str], ...] = (
    ("host", str, "127.0.0.1", "Address to listen on."),
    ("port", int, 8000, "TCP port; 0 takes any free one."),
    ("allow_origin", tuple, (), "Origin of web pages that may ask, or *; may be repeated."),
    ("allow_host", tuple, (), "Name by which clients call this machine, or *; may be repeated."),
    ("max_prompt_tokens", int, 8192, "Longest prompt."),
    ("max_new_tokens", int, 1024, "Most tokens that a request may ask for."),
    ("recompute", bool, True, "Take requests with use_cache = false, which keep no KV."),
    ("max_recompute_tokens", int, 2048, "Prompt and answer of such a request."),
    ("max_concurrency", int, 32, "Sequences that are computed together."),
    ("max_waiting", int, 256, "Sequences that wait for that; one more is refused with 503."),
    ("max_connections", int, 1024, "Connections served at once."),
    ("max_body_bytes", int, 4 << 20, "Longest body of a request."),
    ("bodies_bytes", int, 64 << 20, "Bodies of all requests under way, together."),
    ("head_timeout_s", float, 10.0, "Seconds for the head of a request to come."),
    ("body_timeout_s", float, 30.0, "Seconds for its body to come."),
    ("read_timeout_s", float, 30.0, "Seconds for a reader to take what waits for it."),
    ("keep_alive_s", int, 15, "Seconds that an idle connection stays open."),
    ("heartbeat_s", float, 15.0, "Seconds until a stream without news says that it lives."),
    ("stop_timeout_s", int, 20, "Seconds for requests to finish after SIGTERM."),
    ("retry_after_s", int, 1, "Seconds after which a 503 asks to come again."),
)


def _setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for field, kind, default, about in reversed(SETTINGS):
        name = f"--{field.removesuffix('_s').replace('_', '-')}"
        if kind is bool:
            name = f"{name}/--no{name[1:]}"
        how: dict[str, Any] = {"type": kind, "default": default, "show_default": True}
        if kind is tuple:
            how = {"multiple": True, "metavar": name.rpartition("-")[2].upper()}
        add = click.option(name, field, help=about, **how)
        command = add(command)
    return command


@click.command(short_help="Serve a model over HTTP, with the cache.")
@click.option(
    "--model",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder with a checkpoint and its tokenizer; nothing is downloaded.",
)
@click.option(
    "--name", default="", help="What clients call the model.  [default: the folder's name]"
)
@click.option(
    "--url",
    envvar="RESPKV_URL",
    show_envvar=True,
    metavar="URL",
    help="Server that keeps the pages; without it an engine in this process does.",
)
@click.option("--maxmemory", metavar="SIZE", help="Memory of that engine.  [default: 1gb]")
@click.option("--config", metavar="FILE", help="Settings of that engine in TOML, as of serve.")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any setting of it; may be repeated.",
)
@click.option("--namespace", help="Of the model's pages.  [default: from a hash of the weights]")
@click.option("--page-tokens", default=64, show_default=True, help="Tokens of a page.")
@click.option(
    "--kv-memory", default="1gb", show_default=True, metavar="SIZE", help="KV of what is computed."
)
@click.option(
    "--always-load", is_flag=True, help="Load stored KV even where computing it should be quicker."
)
@click.option("--dtype", default="auto", show_default=True, help="Of the weights; auto: as stored.")
@click.option("--device", default="cpu", show_default=True, help="Of the model, such as cuda:0.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that torch computes with.")
@click.option(
    "--token-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File with the bearer token that clients need; or in RESPKV_GATEWAY_TOKEN.",
)
@click.option(
    "--loglevel",
    type=click.Choice(["debug", "info", "warning"]),
    default="info",
    show_default=True,
    help="Least important messages that are logged; info has a line for each request.",
)
@_setting_options
def command(
    folder: Path,
    name: str,
    url: str | None,
    maxmemory: str | None,
    config: str | None,
    pairs: tuple[str, ...],
    kv_memory: str,
    token_file: Path | None,
    loglevel: str,
    **options: Any,
) -> None:
    """Serve a model over HTTP until SIGTERM or SIGINT: /generate, and OpenAI's endpoints under /v1."""
    _check_extra()
    engine = {"maxmemory": maxmemory or "1gb", **dict(pair_of(pair) for pair in pairs)}
    if url is not None and (maxmemory or config or pairs):
        raise ConfigError(
            "--url: accepted without --maxmemory, --config and --set, which are the engine's"
        )
    if config is not None and maxmemory is None:
        engine.pop("maxmemory")
    from respkv.gateway.checkpoint import Checkpoint
    from respkv.gateway.settings import GatewaySettings

    checkpoint = Checkpoint(
        folder=folder,
        name=name,
        url=url,
        config=config,
        settings={key.replace("-", "_"): value for key, value in engine.items()},
        kv_memory=_size("--kv-memory", kv_memory),
        **{key: options.pop(key) for key in _CHECKPOINT},
    )
    settings = GatewaySettings(token=_token(token_file), **options)
    # Not before all options are known to be right: with these come torch and transformers.
    click.echo("respkv gateway: importing torch and transformers", err=True)
    from respkv.gateway.loading import load
    from respkv.gateway.serve import Process

    logging.basicConfig(
        level=loglevel.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Its lines say nothing that ours do not, except for errors; and whoever sends no HTTP could
    # have it write as many warnings as he likes.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    Process(settings, lambda: load(checkpoint, settings)).run(
        lambda line: click.echo(f"respkv gateway: {line}", err=True)
    )


_CHECKPOINT = ("namespace", "page_tokens", "always_load", "dtype", "device", "threads")


def _check_extra() -> None:
    """Raise ConfigError when a package of the extra is not there."""
    missing = [package for package in EXTRA if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"gateway needs {', '.join(missing)}, not installed: pip install 'respkv[gateway]'"
        )


def _size(option: str, text: str) -> int:
    kind = Size(about="", least=1 << 20)
    read = kind.read(text)
    if read is None:
        raise ConfigError(f"{option} = {text!r}: accepted are {kind.accepted}")
    assert isinstance(read, int)
    return read


def _token(file: Path | None) -> str | None:
    """Return the token; never from the command line, which every process of the machine can read."""
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE)
        if token == "":  # somebody meant to set one, and it did not arrive
            raise ConfigError(
                f"{TOKEN_VARIABLE} is empty: accepted are a token, or no such variable to let all in"
            )
        return token
    try:
        return file.read_text().strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise ConfigError(f"--token-file {str(file)!r}: {reason}") from error
