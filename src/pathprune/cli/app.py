"""The command line: all commands, and how they end."""

from __future__ import annotations

import inspect as signatures
import os
import re
import signal
import sys
import warnings
from typing import Annotated

import typer

from pathprune._version import __version__
from pathprune.cli.demo import demo
from pathprune.cli.elastic import elastic
from pathprune.cli.evaluate import evaluate
from pathprune.cli.export import export
from pathprune.cli.inspect import inspect
from pathprune.cli.recover import recover
from pathprune.cli.report import report
from pathprune.cli.search import search
from pathprune.cli.slice import slice_
from pathprune.errors import PathpruneError

app = typer.Typer(
    name="pathprune",
    help="One search on a pretrained transformer gives the whole family: a model of any size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


for command in (inspect, search, slice_, recover, elastic, evaluate, export, report, demo):
    app.command(command.__name__.rstrip("_"))(command)


def main() -> None:
    """Entry point: bad input ends with one clear line and exit code 2, Ctrl-C with 130, as does what a scheduler sends
    before it kills.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {_line(message)}", err=True)
        sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except PathpruneError as error:
        return _failed(_line(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at its end)
        return 141
    except OSError as error:
        return _failed(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except MemoryError as error:
        return _failed(f"out of memory; a smaller --batch-size needs less {error}")
    except Exception as error:
        if hasattr(error, "exit_code"):  # a wrong option or argument, which knows how to show itself
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)
        if os.environ.get("PATHPRUNE_TRACEBACK"):
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            return _failed("the device is out of memory; a smaller --batch-size or --max-length needs less")
        return _failed(
            f"{type(error).__name__}: {_line(error)[:300]}. pathprune did not foresee this; please report it "
            "with what the same command prints under PATHPRUNE_TRACEBACK=1"
        )
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


def _failed(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return 2


def _line(message: object) -> str:
    """One line, in which arguments of the library are options: ``steps=1`` is ``--steps 1``."""
    options = {
        name: name.replace("_", "-")
        for command in app.registered_commands
        for name in signatures.signature(command.callback or main).parameters
        if name not in ("model", "models", "run", "folder")  # arguments
    }
    options |= {"lowest_level": "lowest", "bytes": "bytes"}
    return re.sub(
        r"(?<![^\s(])(\w+)=([\w'.-]*)",
        lambda found: f"--{options[found[1]]} {found[2]}".rstrip() if found[1] in options else found[0],
        " ".join(str(message).split()),
    )
