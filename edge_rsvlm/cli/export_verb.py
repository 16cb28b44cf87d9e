from __future__ import annotations

from pathlib import Path
from typing import Any

import click

NEEDS = "pip install 'edge-rsvlm[export]'"


@click.group("export")
def command() -> None:
    """Turn a checkpoint into a bundle. For the ground: needs pip install 'edge-rsvlm[export]'."""


@command.command("run")
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder of a Hugging Face checkpoint.")
@click.option("--adapter", multiple=True, metavar="DIR[=WEIGHT]", help="Folder of a PEFT LoRA; may be repeated.")
@click.option(
    "--target",
    metavar="FORMAT:BITS",
    help="onnx:f32, f16, int8, int4, or gguf:F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_XS.  [default: onnx:f32]",
)
@click.option(
    "--calibration", metavar="FOLDER_OR_TAR", help="Images like those of the mission, for targets of fewer bits."
)
@click.option("--goal", metavar="WHAT=HOW_MUCH", help="size=12MiB, latency=50ms or accuracy-loss=0.5: search the mix.")
@click.option("--profile", help="Device that it must fit.  [default: host]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the new bundle.")
@click.option(
    "--allow",
    type=click.Choice(["parity", "accuracy"]),
    multiple=True,
    help="Go on though this gate fails; the bundle records it.",
)
@click.option("--explain", "explained", is_flag=True, help="Print the plan and the sizes, and do nothing.")
def run(
    recipe: Path | None, checkpoint: Path | None, adapter: tuple[str, ...], target: str | None,
    calibration: str | None, goal: str | None, profile: str | None, out: Path | None, allow: tuple[str, ...],
    explained: bool,
) -> None:  # fmt: skip
    """Check, merge, compile, prove and quantize a checkpoint, and write it as a bundle.

    RECIPE is a TOML file (docs/cli.md); the options say the same without one, or replace what it says. A killed export
    goes on where it stopped.
    """
    chain = _chain()
    given: dict[str, Any] = {
        "checkpoint": checkpoint, "target": target, "profile": profile, "out": out, "allow": allow,
        "adapters": [_adapter(text) for text in adapter], "calibration": calibration and {"images": calibration},
        "goal": goal,
    }  # fmt: skip
    wanted = _recipe(recipe, {key: value for key, value in given.items() if value})
    if explained:
        click.echo(chain.explain_export(wanted))
        return
    if misfit := chain.misfit_of_export(wanted):
        click.echo(f"warning: {misfit}; it is exported all the same", err=True)
    with _step_bars() as report:
        folder = chain.run_export(wanted, report)
    for sentence in chain.warnings(folder):
        click.echo(f"warning: {sentence}", err=True)
    click.echo(str(folder))


@command.command("finetune")
@click.argument("recipe", type=click.Path(path_type=Path))
def finetune(recipe: Path) -> None:
    """Train a LoRA adapter on captions, questions or boxes, which `export run --adapter` takes.

    RECIPE is a TOML file (docs/cli.md). A stopped run goes on from its last checkpoint; torchrun shares the work.
    """
    _chain()
    from edge_rsvlm.export.finetuning.recipe import load_finetune_recipe
    from edge_rsvlm.export.finetuning.run import finetune

    wanted = load_finetune_recipe(recipe)
    with _training_bar("finetune") as progress:
        click.echo(str(finetune(wanted, progress)))


@command.command("distill")
@click.argument("recipe", type=click.Path(path_type=Path))
def distill(recipe: Path) -> None:
    """Teach a smaller checkpoint what a larger one answers; the result is a checkpoint that `export run` takes.

    RECIPE is a TOML file (docs/cli.md). What the teacher wrote is kept, and a stopped run goes on where it was.
    """
    _chain()
    from edge_rsvlm.export.distilling.recipe import load_distill_recipe
    from edge_rsvlm.export.distilling.run import distill

    wanted = load_distill_recipe(recipe)
    with _step_bars() as captioned, _training_bar("distill") as progress:
        click.echo(str(distill(wanted, progress, lambda done, total: captioned("captions", done, total))))


def _chain() -> Any:
    from edge_rsvlm.errors import UsageError

    try:
        from edge_rsvlm.export import chain
    except ModuleNotFoundError as missing:
        raise UsageError(f"export needs '{missing.name}', which is not installed", fix=NEEDS) from missing
    from transformers.utils import logging

    # Bars of its own, and warnings about texts that nobody feeds to the model.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return chain


def _adapter(text: str) -> dict[str, Any]:
    """``DIR`` or ``DIR=WEIGHT``; a folder that is there is taken by its whole name."""
    path, _, weight = text.rpartition("=")
    return {"path": path, "weight": weight} if path and not Path(text).exists() else {"path": text}


def _recipe(path: Path | None, given: dict[str, Any]) -> Any:
    from edge_rsvlm.config.model import parse
    from edge_rsvlm.errors import UsageError
    from edge_rsvlm.export.recipe import Recipe, load_recipe

    if path is None and not {"checkpoint", "out"} <= given.keys():
        raise UsageError("nothing to export", fix="name a RECIPE.toml, or give --checkpoint and --out")
    base = load_recipe(path).model_dump() if path else {}
    return parse(Recipe, base | given, "export", UsageError)


def _step_bars() -> Any:
    """A bar per step on stderr when a person is looking, and else a line per step."""
    from contextlib import contextmanager

    @contextmanager
    def bars() -> Any:
        import sys

        if not sys.stderr.isatty():
            seen: set[str] = set()

            def say(step: str, done: int, total: int) -> None:
                if step not in seen:
                    seen.add(step)
                    click.echo(step, err=True)

            yield say
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as progress:
            tasks: dict[str, Any] = {}

            def show(step: str, done: int, total: int) -> None:
                task = tasks.setdefault(step, None) or progress.add_task(step, total=total)
                tasks[step] = task
                progress.update(task, completed=done, total=total)

            yield show

    return bars()


def _training_bar(name: str) -> Any:
    """A bar on stderr when a person is looking, and else a line for every tenth of the way."""
    import sys
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Any:
        if not sys.stderr.isatty():
            said = [-1]

            def say(step: int, share: float, loss: float) -> None:
                if int(share * 10) > said[0]:
                    said[0] = int(share * 10)
                    click.echo(f"{name}: {share:.0%}, step {step}, loss {loss:.4g}", err=True)

            yield say
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(name, total=1.0)

            def show(step: int, share: float, loss: float) -> None:
                progress.update(task, completed=share, description=f"{name} step {step}, loss {loss:.4g}")

            yield show

    return bar()
