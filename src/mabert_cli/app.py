"""`mabert`: the commands, and what becomes of an error."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from mabert_cli import environment, experiments, training, use
from mabert_cli.console import errors, show_log


class Commands(TyperGroup):
    """A group of commands in which bad input ends in one message and exit code 2, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            if ctx.params["debug"]:
                raise
            errors.print(f"[bold red]Error:[/] [red]{escape(str(error))}[/]", soft_wrap=True, highlight=False)
            errors.print(f"[dim]{type(error).__name__}; mabert --debug … shows where it was raised[/]")
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Hybrid Mamba-Transformer encoders: from text to a model in use."""
    show_log(debug)


app.command("tokenizer")(training.tokenizer)
app.command("pretrain")(training.pretrain)
app.command("finetune")(training.finetune)
app.command("predict")(use.predict)
app.command("fill-mask")(use.fill_mask)
app.command("generate")(use.generate)
app.command("encode")(use.encode)
app.command("experiment")(experiments.experiment)
app.command("glue")(experiments.glue)
app.command("report")(experiments.report)
app.command("env")(environment.env)


def main() -> None:
    """The console script."""
    app()
