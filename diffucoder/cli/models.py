"""`diffucoder models`: list models."""

import sys


def models() -> None:
    """List the models that are here, and those that can be fetched."""
    from rich.console import Console
    from rich.table import Table

    from diffucoder.models.hub import KNOWN_MODELS, SHIPPED

    table = Table("name", box=None)
    for heading in ("model", "parameters", "size", "licence", "here", "note"):
        table.add_column(heading, overflow="fold")  # never cut: these are to be copied
    if SHIPPED.is_dir():
        stored = (SHIPPED / "model.safetensors").stat().st_size
        size = f"{stored / 1e6:.0f} MB"
        parameters = f"{stored / 2e6:.1f}M"  # of two bytes
        note = "short functions; see docs/models.md"
        table.add_row("(default)", "tiny, shipped", parameters, size, "Apache-2.0", "yes", note)
    for known in KNOWN_MODELS:
        here = "yes" if known.cached else "no"
        size = f"{known.size_gb} GB"
        table.add_row(known.name, known.hub_id, known.parameters, size, known.licence, here, known.note)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
