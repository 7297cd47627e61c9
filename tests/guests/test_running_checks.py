# Copyright (c) the ptinspect authors
# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Nothing is found in stock kernels that rest, but run.

Apart from the tests of stopped guests: those keep the guest's only QMP socket while they last.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from resting import Running

from ptinspect.checks import Verdict, run_checks
from ptinspect.target import open_target

pytestmark = pytest.mark.guest


def test_silent_on_a_running_kernel(running: Running) -> None:
    with open_target(replace(running.paused, pause=False)) as target:
        assert target.racing
        results = run_checks(target.prog, racing=True)
    assert [f"{f.invariant}: {f.message} {f.evidence}" for f in results.findings] == []
    assert Verdict.FAILED not in {result.verdict for result in results.results}
