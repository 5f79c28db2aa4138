"""`saddle NAME`: a module for each command, imported when it is called. `run` turns errors into one line and an exit
code."""

import io
import sys
from contextlib import suppress
from importlib import import_module

import click

from data.errors import DataError
from data.names import printable
from gan.errors import UserError
from gan.files import flush_output

COMMANDS = {
    "prepare": "Build an LMDB dataset from a folder, an archive or another source of images.",
    "inspect": "Show what is in a dataset.",
    "verify": "Check every record of a dataset.",
    "train": "Train a GAN on a dataset, or resume a run.",
    "generate": "Make an image grid, single images or a video from a snapshot.",
    "average": "Average a run's generator over another length of time, after training.",
    "evaluate": "Score snapshots against a dataset, or estimate divergences.",
    "benchmark": "Measure ops, training steps, data and methods.",
    "doctor": "Show what works on this machine, what is missing, and how to install it.",
    "demo": "Train on real digits in a few minutes and show the results.",
}


class Saddle(click.Group):
    """A group that imports a command only when it is called: `saddle --help` must not wait for torch."""

    table = COMMANDS
    module = "launch.{}"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(self.module.format(name)).main if name in self.table else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))


@click.group(cls=Saddle, invoke_without_command=True)
@click.pass_context
def saddle(ctx: click.Context) -> None:
    """Saddlepoint: progressive ResNet GANs, from one CPU to many GPU nodes."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(command: click.Command, name: str) -> None:
    """Run a command and exit: with 0 or the code it returns; with 2 and one line for wrong usage or input; with 130
    after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be bytes that are not text
    try:
        command.context_settings.setdefault("help_option_names", ["-h", "--help"])
        code = command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else name
        refuse(where, error.format_message())
    except (UserError, DataError) as error:
        from launch.settings import as_flags

        refuse(called(name), as_flags(str(error)))
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes it for Ctrl-D
            refuse(called(name), "a file ends in the middle")
        sys.exit(130)
    except OSError as error:
        refuse(called(name), of_system(error))
    except RuntimeError as error:
        from ops.toolchain import BuildError

        if not isinstance(error, BuildError):
            raise
        refuse(name, str(error))
    finally:
        flush_output()
    sys.exit(code or 0)


def called(name: str) -> str:
    """The command in the user's words: `saddle train`, whether it was started so or as a module."""
    return " ".join([name, *sys.argv[1:2]]) if name == "saddle" else name


def of_system(error: OSError) -> str:
    """An error of the system in one line: a full disk, a file system that is read-only, a folder that was removed."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def refuse(where: str, message: str) -> None:
    """Print one line on standard error, and exit with 2."""
    with suppress(OSError):  # the reader of standard error may be gone
        print(f"{where}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Entry point of the console script `saddle`."""
    run(saddle, "saddle")


if __name__ == "__main__":
    main()
