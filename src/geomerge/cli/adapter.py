"""``geomerge adapter``: LoRA adapters combined into one, or extracted from a fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geomerge.cli.options import AllowPickle, AsJson, Quiet, Threads

if TYPE_CHECKING:
    from geomerge.adapter.report import Report

adapter_app = typer.Typer(
    help="LoRA adapters: combine several into one, or extract one from a fine-tune.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_LINES = 40

Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The adapter's directory to make.")]
Rank = Annotated[int | None, typer.Option(min=1, metavar="R", help="At most so many directions for each layer.")]
Energy = Annotated[
    float | None, typer.Option(metavar="E", help="The fewest directions that hold this share of a layer's ‖ΔW‖².")
]
DType = Annotated[str, typer.Option(metavar="DTYPE", help="Of the factors that are written.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Key of all random draws.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing adapter.")]


@adapter_app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="PEFT directories or hub ids, all for one base.")
    ],
    out: Out,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="linear, task_arithmetic, slerp, karcher, ties, dare_ties, ... (see `geomerge methods`).",
        ),
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="A weight for each adapter, or one for all.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A parameter of the method, like density=0.3; may be repeated."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Their base: needed when they hold norms, embeddings or heads whole."),
    ] = None,
    knots: Annotated[
        bool, typer.Option("--knots", help="Merge in the basis that the adapters share (KnOTS): for TIES and DARE.")
    ] = False,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DType = "float32",
    seed: Seed = 0,
    threads: Threads = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Combine adapters into one (or truncate one), on ΔW = s·B·A and never on A and B apart.

    Sums and interpolations are exact; without --rank they have the rank of all adapters together. TIES, DARE and their kin
    are computed on ΔW tile by tile and then truncated. The error of truncation is measured for each layer.
    """
    from geomerge.adapter.combine import combine as make
    from geomerge.cli.steps import watch_steps

    parameters = _parameters(set_ or [])
    if weights is not None:
        parameters["weight"] = _value(weights, "--weights")
    with watch_steps("combining", "layers", quiet=quiet or json) as progress:
        report = make(
            adapters,
            out,
            method=method,
            parameters=parameters,
            base=base,
            knots=knots,
            rank=rank,
            energy=energy,
            seed=seed,
            dtype=dtype,
            threads=threads,
            force=force,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    _tell(report, json=json)


@adapter_app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that was fine-tuned.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tune; BASE+ADAPTER is one, too.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    rest: Annotated[
        str,
        typer.Option(
            metavar="RULE", help="Changed norms, embeddings and heads: save them whole, drop them, or refuse."
        ),
    ] = "save",
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Put before module names, like 'transformer.' for a bare GPT-2.")
    ] = "",
    dtype: DType = "float32",
    seed: Seed = 0,
    threads: Threads = None,
    force: Force = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Make a LoRA adapter that turns BASE into TUNED.

    The difference of every linear layer is read block by block and truncated to a rank, or to the rank that holds a share of
    its energy. The error is measured for each layer.
    """
    from geomerge.adapter.extract import extract as make
    from geomerge.cli.steps import watch_steps

    with watch_steps("extracting", "tensors", quiet=quiet or json) as progress:
        report = make(
            base,
            tuned,
            out,
            rank=rank,
            energy=energy,
            rest=rest,  # type: ignore[arg-type]  # checked there
            prefix=prefix,
            dtype=dtype,
            seed=seed,
            threads=threads,
            force=force,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    _tell(report, json=json)


def _parameters(settings: list[str]) -> dict[str, Any]:
    from geomerge.errors import UsageError

    made: dict[str, Any] = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or not name:
            raise UsageError(f"--set {setting!r} is not of the form NAME=VALUE")
        made[name.strip()] = _value(value, f"--set {name}")
    return made


def _value(text: str, where: str) -> Any:
    """A number, true or false, a word; several with commas between them."""
    from geomerge.errors import UsageError

    words = [w.strip() for w in text.split(",")]
    if "" in words:
        raise UsageError(f"{where} has an empty value: {text!r}")
    values = [_one(w) for w in words]
    return values if len(values) > 1 else values[0]


def _one(word: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _tell(report: Report, *, json: bool) -> None:
    from geomerge.cli.console import amount, bullets, clean, count, facts, heading, show, table, write_json

    if json:
        write_json({"out": str(report.out), **report.to_json()})
        return
    worst = sorted(report.layers, key=lambda each: -each.relative)[:_LINES]
    rows = [
        (clean(e.module), " × ".join(map(str, e.shape)), str(e.rank), f"{e.norm:.4g}", f"{e.relative:.2%}")
        for e in worst
    ]
    ranks = sorted({each.rank for each in report.layers})
    said: list[tuple[str, Any]] = [
        ("adapter", clean(report.out)),
        ("how", clean(report.how)),
        ("layers", count(len(report.layers), "layer") + (f", rank {ranks[0]} to {ranks[-1]}" if ranks else "")),
        ("error", f"{report.relative:.3%} of ‖ΔW‖ = {report.norm:.4g} left out by truncation"),
        ("size", amount(report.nbytes)),
    ]
    if report.whole:
        said.append(("whole", f"{count(len(report.whole), 'tensor')}, such as {clean(report.whole[0])}"))
    if report.left_out:
        said.append(("left out", f"{count(len(report.left_out), 'tensor')}, such as {clean(report.left_out[0][0])}"))
    heads = ("layer", "shape", "rank", "‖ΔW‖", "error")
    shown = "layers" if len(worst) == len(report.layers) else f"the {len(worst)} layers with the largest errors"
    show(facts(said), heading(shown), table(heads, rows, right=heads[1:]))
    if report.notes:
        show(heading("notes"), bullets(map(clean, report.notes)))
