"""`diffucoder order`: analyse the order in which models write."""

import json
from functools import partial
from typing import Annotated

import typer

from diffucoder.analysis.settings import Conventions
from diffucoder.cli.common import AsJson, show_progress
from diffucoder.errors import ConfigError
from diffucoder.evaluation.settings import OrderSettings
from diffucoder.options import with_options


@partial(with_options, of=Conventions, into="conventions")
@partial(with_options, of=OrderSettings, into="settings", argument="prompts")
def order(
    *,
    settings: OrderSettings,
    conventions: Conventions,
    show: Annotated[int, typer.Option(min=1, help="samples of each run that the page holds")] = 100,
    as_json: AsJson = False,
) -> None:
    """Analyse the order in which models write: AR-ness, entropies, what comes first; a page to look at it.

    A run that was stopped is continued. Answers are graded, in the sandbox, where there are tests.
    """
    try:
        from diffucoder.analysis.report import summary, write
    except ModuleNotFoundError as error:
        raise ConfigError(f'the report needs {error.name}; install it: pip install "diffucoder[report]"') from None
    from diffucoder.evaluation.run import record_orders

    folders = record_orders(settings, show_progress)
    report = write(settings.folder, folders, conventions, show=show)
    if as_json:
        print(json.dumps(report))
    else:
        print(summary(report, settings.folder))
