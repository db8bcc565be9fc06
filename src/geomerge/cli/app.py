"""The program: its verbs, and what becomes of whatever goes wrong in them.

Exit codes: 0 done; 1 the run failed; 2 usage or recipe error; 3 incompatible or damaged models; 4 a quality gate said no;
130 interrupted. Starting up must stay cheap (``geomerge --help`` imports neither torch nor rich), so nothing heavy is
imported at the top of any file of this package.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from geomerge.cli.console import Stopped, complain, owe_json, show_warnings, write_error
from geomerge.errors import MAKE_ROOM, NO_ROOM, GeomergeError
from geomerge.version import __version__

VERBS = {
    "merge": "merge:merge",
    "moe": "moe:moe",
    "transplant": "transplant:transplant",
    "finalize": "finalize:finalize",
    "plan": "plan:plan",
    "diagnose": "diagnose:diagnose",
    "tokens": "tokens:tokens",
    "evaluate": "evaluate:evaluate",
    "report": "report:report",
    "search": "search:search",
    "soup": "soup:soup",
    "compress": "compress:compress",
    "extract": "compress:extract",
    "export": "export:export",
    "inspect": "inspect:inspect",
    "methods": "methods:methods",
    "schema": "schema:schema",
    "demo": "demo:demo",
    "continue": "continual:continue_",
    "adapter": "adapter:adapter_app",
    "lab": "lab:lab_app",
}
"""In the order of the help: a verb, and where its function (or its own program of verbs) is, ``file:name`` in this package."""
DEBUG = "--debug"


class _Verbs(TyperGroup):
    """Lets an interruption through to `main`, which says more about it than the framework does."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("nothing was changed") from None


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"geomerge {__version__}")
        raise typer.Exit


def geomerge(
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[  # noqa: ARG001 - `main` takes it out, for it may stand behind the verb, too
        bool, typer.Option(DEBUG, help="Show a traceback when something fails.")
    ] = False,
) -> None:
    """Merge trained neural networks that share an architecture.

    A recipe (geomerge's or mergekit's YAML) says which models and how; `plan` shows what it would do, `merge` does it.
    """
    show_warnings()


def program(words: Sequence[str] = ()) -> typer.Typer:
    """The program with the one verb that a command line begins with, or with all where it begins with something else.

    So a run reads and builds one verb, not twenty: that is a tenth of a second.
    """
    app = typer.Typer(
        cls=_Verbs,
        rich_markup_mode=None,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(geomerge)
    for verb in words[:1] if VERBS.keys() & words[:1] else VERBS:
        file, name = VERBS[verb].split(":")
        found = getattr(importlib.import_module(f"geomerge.cli.{file}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb, short_help=found.info.help)
            for command in found.registered_commands:
                command.short_help = _first_line(command.callback)
        else:
            app.command(verb, short_help=_first_line(found))(found)
    return app


def _first_line(verb: object) -> str:
    return (verb.__doc__ or "").strip().partition("\n")[0]


def _stranger(error: Exception) -> str | None:
    """The module with methods of another package in which the error came up."""
    registry = sys.modules.get("geomerge.methods.registry")
    strangers = registry.strangers() if registry is not None else set()
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((module for module in reversed(modules) if module in strangers), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The command line without the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != DEBUG]
    debug = len(words) < len(given)
    owe_json("--json" in words)
    for stream in (sys.stdout, sys.stderr):
        # θ on a terminal that knows only ASCII is to be shown as an escape, not to end the run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def fail(kind: str, what: str, *, where: str | None = None, hint: str | None = None, exit_code: int) -> int:
        complain(kind, what, where=where, hint=hint)
        write_error(what, where=where, hint=hint, exit_code=exit_code)
        return exit_code

    def bug(error: Exception) -> int:
        if debug:
            traceback.print_exc()
        again = "" if debug else f"run it again with {DEBUG} for the traceback, and "
        guilty = _stranger(error)
        of = "this is a bug in geomerge" if guilty is None else f"{guilty}, which adds methods to geomerge, failed"
        to = "" if guilty is None else " to those who make it"
        what = f"{of}: {type(error).__name__}: {error}"
        return fail("error", what, hint=f"{again}please report it{to} with the recipe and the command", exit_code=1)

    try:
        get_command(program(words)).main(args=words, prog_name="geomerge")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Stopped as stopped:
        return fail("interrupted", stopped.what, hint=stopped.hint, exit_code=130)
    except GeomergeError as error:
        if debug:
            traceback.print_exc()
        return fail("error", error.what, where=error.where, hint=error.hint, exit_code=error.exit_code)
    except OSError as error:
        full = error.errno in NO_ROOM
        if not full and (error.filename is None or not error.strerror):
            return bug(error)
        if debug:
            traceback.print_exc()
        where = None if error.filename is None else os.fspath(error.filename)
        return fail("error", error.strerror or str(error), where=where, hint=MAKE_ROOM if full else None, exit_code=1)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, the user gets a sentence
        return bug(error)
    return 0
