"""The units for systemd: that they are valid, let a front do little, and let it end."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.app import CLOSING_S
from server.config.load import load

UNIT = Path("configs", "systemd", "tierserve.service")
MOST_EXPOSED = 25
"""Of 100, in tenths of what `systemd-analyze security` prints."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that is there on this machine."""
    made = tmp_path / UNIT.name
    made.write_text(UNIT.read_text().replace("/opt/tierserve/bin/tierserve", sys.executable))
    return made


def analyze(*arguments: str | Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze isn't there")
    ran = subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout


def test_the_socket_is_valid(unit: Path) -> None:
    shutil.copy(UNIT.with_suffix(".socket"), unit.parent)
    analyze("verify", "--man=no", "--recursive-errors=no", unit.with_suffix(".socket"))


@pytest.mark.parametrize("with_engine", [False, True])
def test_the_unit_is_valid(unit: Path, with_engine: bool) -> None:
    if with_engine:
        shutil.copytree(f"{UNIT}.d", f"{unit}.d")
    analyze("verify", "--man=no", "--recursive-errors=no", unit)


def test_a_front_may_do_little(unit: Path) -> None:
    analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", unit)


def test_an_engine_reaches_gpus() -> None:
    """One device that is allowed closes all others, and `ProtectClock` allows one."""
    drop_in = Path(f"{UNIT}.d", "engine.conf").read_text()
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text() + drop_in, re.MULTILINE))
    closing = {"PrivateDevices": "no", "DevicePolicy": "auto", "ProtectClock": "no"}
    assert closing.items() <= settings.items()
    assert "DeviceAllow" not in settings


def test_a_stop_has_time_to_end() -> None:
    (timeout_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    servers = [load(each).server for each in Path("configs").glob("*.yaml")]
    assert max(each.drain_s for each in servers) > 0
    for server in servers:
        assert int(timeout_s) >= server.drain_s + server.shutdown_grace_s + CLOSING_S
