# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""``from ptinspect import *``: hides no name of drgn's, and every helper says what it does."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import pydoc
from collections.abc import Iterator

import drgn
import drgn.helpers
import pytest
from drgn.cli import default_globals

import ptinspect

FUNCTIONS = [name for name in ptinspect.__all__ if inspect.isfunction(getattr(ptinspect, name))]


def drgn_names() -> Iterator[str]:
    """All names that a drgn shell, or a star import of any of drgn's helper modules, can have."""
    yield from default_globals(drgn.Program())
    yield from drgn.__all__
    for module in pkgutil.walk_packages(drgn.helpers.__path__, "drgn.helpers."):
        yield from getattr(importlib.import_module(module.name), "__all__", ())


def test_no_name_of_drgn_is_hidden() -> None:
    theirs = set(drgn_names())
    assert len(theirs) > 400
    assert theirs & set(ptinspect.__all__) == set()


@pytest.mark.parametrize("name", ptinspect.__all__)
def test_everything_is_documented(name: str) -> None:
    text = getattr(ptinspect, name).__doc__
    assert text
    # The line that dataclasses and enumerations write themselves does not count.
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_the_result_are_documented(name: str) -> None:
    function = getattr(ptinspect, name)
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert f":param {parameter}:" in text
    assert ":return:" in text or text.startswith("Whether ")


def test_help_is_readable() -> None:
    text = pydoc.plain(pydoc.render_doc(ptinspect))
    assert "docs/scripting.md" in text
    for line in (ptinspect.__doc__ or "").splitlines():
        assert len(line) <= 100
