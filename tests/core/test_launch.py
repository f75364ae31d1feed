"""Launches that pass Triton's binder by are those that it would have made, and whoever watches launches sees them all.

The scenarios are in launching.py, which needs a process of its own, since Triton must not interpret there.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels._core.triton_tools import why_not_installed

PROGRAM = Path(__file__).parent / "launching.py"

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(why_not_installed() is not None, reason=str(why_not_installed())),
]


@functools.cache
def failures() -> dict[str, str | None]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, PROGRAM], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "scenario",
    [
        "a_launch_that_is_known_is_direct_and_triton_s_own",
        "what_varies_freely_is_no_other_kernel",
        "the_rule_for_integers_is_triton_s",
        "descriptors_are_launched_as_triton_makes_them",
        "streams_and_devices_are_those_of_the_moment",
        "hooks_see_every_launch",
        "debugging_goes_through_triton",
        "other_versions_go_through_triton",
        "few_are_remembered",
        "numbers_that_the_key_lacks_go_through_triton",
        "threads_share_a_launcher",
        "every_family_s_launches_become_direct",
    ],
)
def test_launches(scenario: str) -> None:
    assert failures()[scenario] is None, failures()[scenario]


def test_every_scenario_is_asked_for() -> None:
    marks = {mark.args[1][0]: mark.args[1] for mark in test_launches.pytestmark}
    (names,) = marks.values()
    assert failures().keys() == set(names)
