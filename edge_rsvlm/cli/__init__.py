"""The command line. Each verb is one light module that imports what it needs when it runs."""

from __future__ import annotations

import importlib
import sys

import click

from edge_rsvlm import __version__

VERBS = (
    "demo", "caption", "ask", "ground", "detect", "classify", "segment", "change", "rules", "index", "search",
    "run", "watch", "downlink", "plan", "doctor", "profiles", "verify", "keys", "eval", "engine", "export",
)  # fmt: skip


class LazyVerbs(click.Group):
    """Imports ``edge_rsvlm.cli.<verb>`` when the verb is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"edge_rsvlm.cli.{cmd_name}_verb").command
        return command


@click.command(cls=LazyVerbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edge-rsvlm")
def cli() -> None:
    """Captions, answers, objects and changes from remote-sensing images, on small devices.

    Results go to stdout or --output, progress and messages to stderr. Exit codes: 0 done; 2 wrong usage; 3 an input
    could not be used (the others were done); 4 does not fit the memory budget; 5 bundle invalid; 6 deadline reached,
    partial result written.
    """


def main() -> None:
    """Entry point: translate our errors into one line and an exit code."""
    from edge_rsvlm.errors import EdgeRsvlmError

    try:
        cli(prog_name="edge-rsvlm")
    except EdgeRsvlmError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (as `| head` does): nothing is left to say.
        sys.stderr.close()
        sys.exit(0)
