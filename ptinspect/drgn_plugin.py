# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
ptinspect's commands in drgn's shell: ``%ptsummary``, ``%ptwalk`` and so on, one for each.

drgn loads this module as a plugin (entry point ``drgn.plugins``, or ``DRGN_PLUGINS``). The commands
are those of the command line, with the same options but those that name a target: here that is
``prog``.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import click
from drgn import FaultError, ObjectNotFoundError, Program, ProgramFlags
from drgn.commands import (
    DEFAULT_COMMAND_NAMESPACE,
    CommandArgumentError,
    CommandError,
    CommandNamespace,
    DrgnCodeBuilder,
    ParsedCommand,
    drgn_argument,
    parse_shell_command,
)

from ptinspect.cli.main import cli
from ptinspect.cli.snippets import SNIPPETS
from ptinspect.cli.target_options import TargetOption, settle_target
from ptinspect.errors import PtinspectError, explain
from ptinspect.faces.escape import escape

PREFIX = "pt"

#: Commands that make no sense inside of a shell: trace looks at the kernel that runs on this
#: machine, which need not be the shell's program.
_ELSEWHERE = frozenset({"shell", "trace"})

_CODE_PARAMETER = "drgn_code"


class ShellCommand:
    """One command of the command line as a command of drgn's shell (``drgn.commands.Command``)."""

    def __init__(self, name: str, command: click.Command) -> None:
        self.name = f"{PREFIX}{name}"
        self._snippet = SNIPPETS.get(name)
        self._command = copy.copy(command)
        self._command.params = [p for p in command.params if not isinstance(p, TargetOption)]
        if self._snippet is not None:
            help_text = drgn_argument.kwargs["help"]
            self._command.params.append(
                click.Option(["--drgn", _CODE_PARAMETER], is_flag=True, help=help_text)
            )
        self._command.help = _as_typed_here(command.help or "", command)

    def description(self) -> str:
        """Get what the command is for, in one line."""
        return self._command.get_short_help_str(limit=200)

    def format_usage(self) -> str:
        """Get how it is called."""
        with self._context([], resilient=True) as context:
            return self._command.get_usage(context).removeprefix("Usage: ").lstrip("%")

    def format_help(self, *, indent: str = "") -> str:
        """Get the whole help text."""
        with self._context([], resilient=True) as context:
            return textwrap.indent(self._command.get_help(context), indent)

    def enabled(self, prog: Program) -> bool:
        """Kernels only."""
        return bool(prog.flags & ProgramFlags.IS_LINUX_KERNEL)

    def parse(self, source: str, /) -> ParsedCommand[Sequence[str]]:
        """Split as a shell does, with ``|`` and ``>``."""
        return parse_shell_command(source)

    def run(self, prog: Program, name: str, args: Sequence[str], /, **_: Any) -> None:
        """
        Run it on the shell's program.

        :raises CommandError: with one line that says what is wrong
        """
        try:
            with self._context(args) as context:
                if context.params.pop(_CODE_PARAMETER, False):
                    self._print_code(prog, context.params)
                    return
                settle_target(context, prog)
                # Statuses are for the command line: what is incomplete says so itself.
                self._command.invoke(context)
        except click.exceptions.Exit:
            pass  # --help
        except click.ClickException as error:
            raise CommandArgumentError(f"%{self.name}: {error.format_message()}") from None
        except click.exceptions.Abort:
            raise KeyboardInterrupt from None
        except (PtinspectError, FaultError, ObjectNotFoundError) as error:
            raise CommandError(escape(explain(error)[0])) from None

    def _print_code(self, prog: Program, parameters: dict[str, Any]) -> None:
        assert self._snippet is not None
        code = DrgnCodeBuilder(prog)
        self._snippet(code, **parameters)
        code.print()

    def _context(self, args: Sequence[str], *, resilient: bool = False) -> click.Context:
        return self._command.make_context(
            f"%{self.name}", list(args), resilient_parsing=resilient, **cli.context_settings
        )


def _as_typed_here(text: str, command: click.Command) -> str:
    """Write the examples of a help text as they are typed in this shell."""
    names = "|".join(re.escape(name) for name in cli.commands)
    lines = []
    for line in text.splitlines():
        if re.search(rf"\bptinspect .*\b({names})\b", line):
            for option in (p for p in command.params if isinstance(p, TargetOption)):
                value = "" if option.is_flag else r" \S+"
                for flag in option.opts:
                    line = re.sub(rf" {flag}{value}(?= |$)", "", line)
            line = re.sub(rf"\bptinspect (?=({names})\b)", f"%{PREFIX}", line)
        lines.append(line)
    return "\n".join(lines)


def register(namespace: CommandNamespace = DEFAULT_COMMAND_NAMESPACE) -> None:
    """Register every command with drgn."""
    for name, command in cli.commands.items():
        if name not in _ELSEWHERE:
            namespace.register(f"{PREFIX}{name}", ShellCommand(name, command))


register()
