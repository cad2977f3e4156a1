"""The `zops` command: its groups, loaded only when used, and the one place where errors become exit statuses."""

import gc
import importlib
import os
import signal
import sys
from typing import Any

import click

from zops import __version__
from zops.cli.output import Output
from zops.errors import UsageError, ZopsError

INTERRUPTED = 130
# What is made while modules are loaded stays. To look through it for garbage after every 700 objects, as Python does,
# takes a tenth of a short command's time.
_GARBAGE_THRESHOLD = 50_000

# command -> (module, attribute, short help). The help stands here too so that `zops --help` need not import a module;
# a test holds both equal.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "init": ("zops.cli.config", "init", "Write a commented zops.yaml fitted to this host."),
    "config": ("zops.cli.config", "config", "Show the configuration and where each value came from."),
    "doctor": ("zops.cli.doctor", "doctor", "Check this host and say what to do about what is wrong."),
    "provision": ("zops.cli.provision", "provision", "Take this host from bare to serving, step by step."),
    "up": ("zops.cli.instances", "up", "Start the instance, or recreate it where it drifted."),
    "down": ("zops.cli.instances", "down", "Stop and remove the instance."),
    "ps": ("zops.cli.instances", "ps", "List the instances on this host."),
    "logs": ("zops.cli.instances", "logs", "Print the log of the instance."),
    "health": ("zops.cli.health", "health", "Judge running instances, layer by layer."),
    "watch": ("zops.cli.watch", "watch", "Watch the instances of this host and heal them."),
    "generate": ("zops.cli.generate", "generate", "Make an image with the running instance."),
    "cache": ("zops.cli.cache", "cache", "Pull, verify, scrub, warm, back up and restore snapshots."),
    "archive": ("zops.cli.archive", "archive", "List, show, verify, compare and prune archives."),
    "bench": ("zops.cli.bench", "bench", "Measure loading, images, serving and the cache on this host."),
    "image": ("zops.cli.image", "image", "Build the container image."),
    "model": ("zops.cli.model", "model", "List the models that zops knows, or make a synthetic one."),
    "key": ("zops.cli.key", "key", "Make, list and remove the API keys of a server."),
    "serve": ("zops.cli.serve", "serve", "Serve a snapshot over HTTP (what runs inside an instance)."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of `COMMANDS`, which is the order of an operator's day."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit statuses: 0 ok, 1 failed or not healthy, 2 usage, 3 snapshot missing, 4 damaged, 5 engine "
    "unreachable, 6 host short of something, 7 locked, 8 not ready in time, 9 source failed, 130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", message="zops %(version)s")
def cli() -> None:
    """Take a bare GPU host to a serving one, keep its model cache honest and its containers healthy."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the documented status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        # A server that is told to stop before it began has nothing to finish; later it takes the signals itself.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
    else:
        signal.signal(signal.SIGTERM, _interrupt)
        gc.set_threshold(_GARBAGE_THRESHOLD)
    status = run(argv)
    # The process ends with its memory: no last look for garbage.
    gc.freeze()
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit status; errors are rendered here and nowhere else."""
    out = Output.early(argv, os.environ)
    try:
        # standalone_mode=False: click then returns or raises instead of printing and exiting by itself.
        result: Any = cli.main(args=argv, prog_name="zops", standalone_mode=False)
        sys.stdout.flush()
        status = result if isinstance(result, int) else 0
    except (ZopsError, click.ClickException, click.exceptions.Exit) as error:
        if os.environ.get("ZOPS_DEBUG") and isinstance(error, ZopsError):
            raise
        status = _render(error, out)
    except (KeyboardInterrupt, click.Abort):
        out.note("interrupted; what was finished stays, run the same command to go on")
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) went away; Python would complain again while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    return status


def _render(error: ZopsError | click.ClickException | click.exceptions.Exit, out: Output) -> int:
    """Say what went wrong, once, and return the exit status."""
    match error:
        case ZopsError():
            out.error(error)
            return error.exit_status
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return error.exit_code
        case click.ClickException():
            context = getattr(error, "ctx", None)
            hint = f"see: {context.command_path} --help" if context else ""
            # Click lists choices over several lines; ours are one.
            out.error(UsageError(" ".join(error.format_message().split()).rstrip("."), hint=hint))
            return error.exit_code
        case click.exceptions.Exit():
            return error.exit_code


def _leave(_signal: int, _frame: object) -> None:
    # No exception: it would come up anywhere in an import, where a class being made wraps it into a RuntimeError.
    os._exit(0)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
