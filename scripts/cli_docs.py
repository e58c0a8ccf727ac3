"""Write the commands and their options into docs/cli.md, from the program itself: `python scripts/cli_docs.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from pipeline.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
BEGIN, END = "<!-- commands: written by scripts/cli_docs.py -->\n", "<!-- end of commands -->"


def updated(page: str) -> str:
    """The page with its part about the commands as the program is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    program: Any = get_command(app)
    sections = [_table(program), *map(_section, program.commands.values())]
    return before + BEGIN + "".join(sections) + "\n" + END + after


def _section(command: Any) -> str:
    words = [_word(p) for p in command.params if p.param_type_name == "argument"]
    lines = [
        f"### `resnet-batch {command.name}`",
        "",
        command.help,
        "",
        f"    resnet-batch {command.name} [OPTIONS] {' '.join(words)}",
        _table(command),
        command.epilog.replace("\n\n- ", "\n- ").replace(":\n", ":\n\n", 1),
    ]
    return "\n" + "\n".join(lines) + "\n"


def _table(command: Any) -> str:
    rows = [f"| {_name(p)} | {_default(p)} | {p.help} |" for p in command.params]
    return "\n".join(["", "| | default | |", "| --- | --- | --- |", *rows, ""])


def _word(argument: Any) -> str:
    word = argument.metavar if argument.required else f"[{argument.metavar}]"
    return f"{word}…" if argument.nargs == -1 else word


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`".replace("|", "\\|")
    names = " ".join([*parameter.opts, *parameter.secondary_opts])
    return f"`{names}`" if parameter.is_flag else f"`{names} {parameter.metavar}`"


def _default(parameter: Any) -> str:
    if parameter.default in (None, False):
        return ""
    return f"`{parameter.opts[0] if parameter.default is True else parameter.default}`"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
