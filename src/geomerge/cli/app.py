"""The program: its verbs, and what becomes of whatever goes wrong in them.

Exit codes: 0 done; 1 the run failed; 2 usage or recipe error; 3 incompatible or damaged models; 4 a quality gate said no;
130 interrupted. Starting up must stay cheap (``geomerge --help`` imports neither torch nor rich), so nothing heavy is
imported at the top of any file of this package.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from geomerge.cli.adapter import adapter_app
from geomerge.cli.compress import compress, extract
from geomerge.cli.console import Stopped, complain, show_warnings
from geomerge.cli.continual import continue_
from geomerge.cli.demo import demo
from geomerge.cli.diagnose import diagnose
from geomerge.cli.evaluate import evaluate
from geomerge.cli.export import export
from geomerge.cli.finalize import finalize
from geomerge.cli.inspect import inspect
from geomerge.cli.lab import lab_app
from geomerge.cli.merge import merge
from geomerge.cli.methods import methods
from geomerge.cli.moe import moe
from geomerge.cli.plan import plan
from geomerge.cli.report import report
from geomerge.cli.schema import schema
from geomerge.cli.search import search
from geomerge.cli.soup import soup
from geomerge.cli.tokens import tokens
from geomerge.cli.transplant import transplant
from geomerge.errors import GeomergeError
from geomerge.late import put_off
from geomerge.version import __version__

DEBUG = "--debug"


class _Verbs(TyperGroup):
    """Lets an interruption through to `main`, which says more about it than the framework does."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("nothing was changed") from None


app = typer.Typer(
    cls=_Verbs,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"geomerge {__version__}")
        raise typer.Exit


@app.callback()
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


for verb in (
    merge,
    moe,
    transplant,
    finalize,
    plan,
    diagnose,
    tokens,
    evaluate,
    report,
    search,
    soup,
    compress,
    extract,
    export,
    inspect,
    methods,
    schema,
    demo,
):
    app.command()(verb)
app.command("continue")(continue_)
app.add_typer(adapter_app, name="adapter")
app.add_typer(lab_app, name="lab")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The command line without the program's name; by default the process's own.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    for stream in (sys.stdout, sys.stderr):
        # θ on a terminal that knows only ASCII is to be shown as an escape, not to end the run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        get_command(app).main(args=[word for word in given if word != DEBUG], prog_name="geomerge")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Stopped as stopped:
        complain("interrupted", stopped.what, hint=stopped.hint)
        return 130
    except GeomergeError as error:
        if debug:
            traceback.print_exc()
        complain("error", error.what, where=error.where, hint=error.hint)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, the user gets a sentence
        if debug:
            traceback.print_exc()
        again = "" if debug else f"run it again with {DEBUG} for the traceback, and "
        complain(
            "error",
            f"this is a bug in geomerge: {type(error).__name__}: {error}",
            hint=f"{again}please report it with the recipe and the command",
        )
        return 1
    return 0


def run() -> NoReturn:
    """The program as a process: `main`, and then the shortest way out.

    Taking down an interpreter that has torch loaded takes a quarter of a second, and there is nothing left to save.
    """
    put_off("torch")
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
