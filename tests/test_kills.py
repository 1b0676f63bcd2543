"""A fixed sample of the kill campaign. tests/kill_campaign.py says what must hold after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("kill_campaign.py")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kills_leave_the_old_state_or_the_new_one() -> None:
    """Every fifteenth operation of every command. The campaign has its own process, because a fork loses threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", str(CAMPAIGN), "--stride", "15"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[0] == "all"
    assert int(total[1]) >= 30
    assert int(total[-1]) == 0
