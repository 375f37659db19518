"""The commands that the documents give, and what a command's own parser reads out of them."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import REPOSITORY

COMMAND = re.compile(r"nnUNet(v2|UDA)_\w+$")


class Parsed(BaseException):
    """Carries the parser out of a command before it does anything."""


@functools.cache
def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """The commands of all packages by name."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group="console_scripts")}


def starter(words: list[str]) -> tuple[Callable[[], object], list[str]]:
    """What ``words`` starts, and its arguments.

    Raises:
        AssertionError: there is no such command, script or module.
    """
    if words[0] != "python":
        assert words[0] in installed(), f"there is no command {words[0]}"
        return installed()[words[0]].load(), words[1:]
    if words[1] == "-m":
        return lambda: runpy.run_module(words[2], run_name="__main__"), words[3:]
    assert (REPOSITORY / words[1]).is_file(), words[1]
    return lambda: runpy.run_path(str(REPOSITORY / words[1]), run_name="__main__"), words[2:]


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the command that ``words`` starts, and its arguments; nothing is run."""
    main, arguments = starter(words)

    def take(self, args=None, namespace=None):
        raise Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [words[0], *arguments])
        patch.syspath_prepend(REPOSITORY)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", take)
        try:
            main()
        except Parsed as caught:
            return caught.args[0], arguments
    raise AssertionError(f"{words[0]} parsed nothing")


def parsed(words: list[str]) -> argparse.Namespace:
    """Options of a command as its own parser reads them; an unknown command or option is an error."""
    parser, arguments = parser_of(words)
    try:
        return parser.parse_args(arguments)
    except SystemExit as error:
        raise AssertionError(shlex.join(words)) from error


def options(words: list[str]) -> set[str]:
    """Names of all options that a command takes, its subcommand's where one is named."""
    parser, arguments = parser_of(words)
    parsers, found = [parser], set()
    for one in parsers:
        for action in one._actions:
            found.update(action.option_strings)
            if isinstance(action.choices, dict) and arguments and arguments[0] in action.choices:
                parsers.append(action.choices[arguments[0]])
    return found


def bash_blocks(text: str) -> list[str]:
    """What stands between ```` ```bash ```` and ```` ``` ````."""
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)


def command_lines(block: str) -> Iterator[list[str]]:
    """The words of every command of a block that is nnU-Net's, of this package, or a script of this repository.

    Variables before a command, what starts it (``torchrun``, ``do``), and comments are left out.
    """
    for line in block.replace("\\\n", " ").splitlines():
        tokens = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        tokens.whitespace_split = True
        words: list[str] = []
        for token in [*tokens, ";"]:
            if set(token) <= set(";&|"):
                if words:
                    yield words
                words = []
            elif words or COMMAND.match(token) or token == "python":
                words.append(token)


def inline_commands(text: str) -> Iterator[list[str]]:
    """Commands with options between single backticks, which name only some of their options."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for code in re.findall(r"`((?:nnUNet(?:v2|UDA)_|python )[^`]+)`", prose):
        yield from command_lines(" ".join(code.split()))
