"""The typer application: all commands, in the order in which `diffucoder --help` lists them."""

import typer

from diffucoder.cli.bench import bench
from diffucoder.cli.chat import chat
from diffucoder.cli.convert import convert
from diffucoder.cli.evaluate import evaluate
from diffucoder.cli.generate import generate
from diffucoder.cli.infill import infill
from diffucoder.cli.models import models
from diffucoder.cli.order import order
from diffucoder.cli.serve import serve
from diffucoder.cli.train import stages

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Write code in any order with masked-diffusion language models.",
    epilog='Start here: diffucoder generate "Write a function that reverses the string." --watch',
)
for command in (generate, infill, chat, serve, models, convert, evaluate, order, bench):
    app.command()(command)
app.add_typer(stages, name="train")
