"""`sitkit certify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.interrupt import resumable


def certify(
    interp: options.Interp = None,
    target: options.Target = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    quick: Annotated[bool, typer.Option("--quick", help="64 steps and 500 samples: under two minutes.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Where the certificate goes.")] = Path("certificates"),
    json: options.Json = False,
) -> None:
    """Check every combination, plugins included, against closed-form truth; exit 1 if one is wrong."""
    from sitkit.testing.certify import as_plain
    from sitkit.testing.certify import certify as verb

    axes: dict[str, Any] = {"interp": interp, "target": target, "sampler": sampler, "diffusion": diffusion}
    chosen = {axis: [name] for axis, name in axes.items() if name is not None}
    with resumable("nothing is written. Begin again with"), console.progress() as progress:
        done = verb(chosen, quick=quick, folder=folder, progress=progress)
    if json:
        console.as_json(as_plain(done))
    else:
        refused: dict[tuple[str, str], int] = {}
        for verdict in done.verdicts:
            if verdict.verdict == "refused":
                what = dataclasses.replace(verdict.cell, target="")
                refused[str(what), verdict.reason] = refused.get((str(what), verdict.reason), 0) + 1
        rows = [(what, count, reason) for (what, reason), count in refused.items()]
        if rows:
            console.table(("refused", "targets", "reason"), rows)
        orders: dict[str, list[float]] = {}
        for order in done.orders:
            orders.setdefault(f"{order.sampler} ({order.declared})", []).append(order.observed)
        if orders:
            spread = [(name, f"{min(seen):.2f} to {max(seen):.2f}") for name, seen in orders.items()]
            console.table(("sampler (declared order)", "observed"), spread)
        console.say(f"certificate  {folder / 'certificate.json'}   {folder / 'certificate.png'}")
    for line in done.wrong:
        console.error(line)
    wrong = done.count("wrong")
    console.err.print(
        f"{done.count('right')} right, {done.count('refused')} refused, {wrong} wrong, {done.seconds:.0f} s"
    )
    if done.wrong:
        raise typer.Exit(1)
