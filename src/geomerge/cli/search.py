"""``geomerge search``: the coefficients of a merge, found with a budget."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet

if TYPE_CHECKING:
    from geomerge.search.run import Found, Trial


def search(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study's YAML file: parents, objective, budget.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where trials and results lie; by default beside the study file."),
    ] = None,
    merge: Annotated[Path | None, typer.Option("--merge", metavar="OUT", help="Write the winning merge here.")] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML report.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the trials that lie in --out.")] = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Search the coefficients of a merge.

    Presets first, then a sampler's proposals. Candidates are blended in memory; the winner is scored
    on samples that the search has not seen. Interrupted, it keeps what is known; --resume goes on.
    """
    from geomerge.checkpoint.output_place import check_free
    from geomerge.cli.console import Stopped, count, write_json
    from geomerge.search import run
    from geomerge.search.study import load_study

    if merge is not None:
        check_free(merge, hint="name another directory for --merge")
    if report is not None:
        from geomerge.report.build import check_place

        check_place(report, None)
    read = load_study(study)
    folder = out or study.with_suffix("")
    if folder == study:
        folder = study.with_name(study.name + ".search")
    if resume and not quiet and not (folder / run.STORAGE).exists():
        typer.echo(f"nothing to go on with in {folder}: the search begins", err=True)
    # Batch systems end a job with SIGTERM: what is known is then concluded as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found = run.search(read, folder, resume=resume, progress=None if quiet else _Lines(), allow_pickle=allow_pickle)
    except KeyboardInterrupt:
        raise Stopped("no trial was finished") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    interrupted = found.stopped == "interrupted"
    merged = None if interrupted else merge
    if merged is not None:
        from geomerge.api import merge as write

        write(folder / run.RECIPE, merged, allow_pickle=allow_pickle)
    if report is not None:
        from geomerge.search.report import write_report

        write_report(found, report)
    if json:
        write_json(found.to_dict())
    else:
        _show(found, folder, merged, report)
    if interrupted:
        words = ["geomerge", "search", str(study), "--out", str(folder), "--resume"]
        words += [
            w
            for name, path in (("--merge", merge), ("--report", report))
            if path is not None
            for w in (name, str(path))
        ]
        command = shlex.join(words)
        raise Stopped(
            f"what is known is kept in {folder} ({count(len(found.trials), 'trial')})", f"continue with: {command}"
        )


class _Lines:
    """A line on stderr after each trial: it, the best so far, the time left."""

    def __call__(self, trial: Trial, best: Trial, total: int, left: float | None) -> None:
        from geomerge.cli.console import duration

        number = f"{trial.number + 1}/{total}" if total else f"{trial.number + 1}"
        rest = "" if left is None or left <= 0 else f", {duration(left)} left"
        mark = " *" if trial.number == best.number else ""
        typer.echo(
            f"trial {number}  {trial.name:<7} {trial.value:.4f}  best {best.value:.4f} ({best.name}){rest}{mark}",
            err=True,
        )


def _show(found: Found, folder: Path, merged: Path | None, report: Path | None) -> None:
    from geomerge.cli.console import clean, facts, heading, show, table
    from geomerge.search.run import RECIPE

    best, preset = found.trials[found.best], found.trials[found.best_preset]
    value, low, high = found.difference
    rows = [
        (
            "best",
            f"{best.value:.4f} on the search half ({_called(best)}); best preset {preset.name}: {preset.value:.4f}",
        ),
        ("held out", f"{found.held_out[0].value:.4f}; optimism gap {found.optimism:+.4f}"),
        ("against preset", f"{value:+.4f} on held-out samples, 95 % interval [{low:+.4f}, {high:+.4f}]"),
        ("trials", f"{len(found.trials)} ({found.stopped})"),
        ("recipe", clean(folder / RECIPE)),
    ]
    rows += [("merged", clean(merged))] if merged else []
    rows += [("report", clean(report))] if report else []
    parts = list(found.held_out[0].parts)
    # A line for each task: there may be more of them than a terminal has room for side by side.
    short = [PurePath(h.name).name for h in found.held_out]
    names = [clean(s if short.count(s) == 1 else h.name) for s, h in zip(short, found.held_out, strict=True)]
    scores = [("objective", *(f"{h.value:.4f}" for h in found.held_out))]
    scores += [(clean(part), *(f"{h.parts[part]:.4f}" for h in found.held_out)) for part in parts]
    show(
        facts(rows),
        heading("On samples that the search has not seen"),
        table(("task", *names), scores, right=names),
    )


def _called(trial: Trial) -> str:
    return f"trial {trial.number + 1}" if trial.name == "trial" else f"preset {trial.name}"
