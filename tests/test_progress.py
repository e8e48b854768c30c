"""Progress bars on a terminal: nested ones take a line each, and what is left on the screen is what the program printed."""
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import modelq

pytestmark = pytest.mark.slow

NESTED = """
import sys, time
import modelq.progress as p
p.DELAY_SECONDS = {delay}
try:
    for a in p.progress(range(3), "formats", unit="format"):
        for b in p.progress(range(4), "layers"):
            time.sleep(0.06)
            if {stop} and a == 1:
                raise KeyboardInterrupt
        for b in p.progress(iter(range(2)), "batches", total=2):
            time.sleep(0.06)
except KeyboardInterrupt:
    print("stopped")
print("done")
"""


class Screen:
    """What a terminal shows: only what tqdm and print need."""

    def __init__(self):
        self.lines, self.row, self.column, self.most = [""], 0, 0, []

    def feed(self, text):
        for piece in re.findall(r"\x1b\[A|\x1b\[[0-9;]*m|[^\x1b]", text, flags=re.S):
            if piece == "\x1b[A":
                self.row = max(0, self.row - 1)
            elif piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif piece[0] != "\x1b":
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[:self.column] + piece + line[self.column + 1:]
                self.column += 1
                continue
            shown = [line.strip() for line in self.lines if line.strip()]
            if len(shown) > len(self.most):
                self.most = shown

    @property
    def shown(self):
        return [line.strip() for line in self.lines if line.strip()]


def on_a_terminal(code, columns=80, **environment):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(Path(modelq.__file__).parents[1]), **environment}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment, cwd=Path(__file__).parent)
    os.close(theirs)
    screen = Screen()
    try:
        while data := os.read(ours, 65536):
            screen.feed(data.decode())
    except OSError:     # Linux's way to say that nobody is at the other end
        pass
    os.close(ours)
    assert process.wait() == 0
    return screen


@pytest.mark.parametrize("stop", [False, True])
def test_nested_bars_are_tidy(stop):
    screen = on_a_terminal(NESTED.format(delay=0, stop=stop))
    assert screen.shown == ["stopped", "done"][not stop:]
    assert [line.split(":")[0] for line in screen.most] == ["formats", "layers"]


def test_short_work_and_tqdm_disable_show_nothing():
    assert on_a_terminal(NESTED.format(delay=60, stop=False)).most in ([], ["done"])
    assert on_a_terminal(NESTED.format(delay=0, stop=False), TQDM_DISABLE="1").most in ([], ["done"])


def test_a_narrow_terminal_does_not_wrap():
    screen = on_a_terminal(NESTED.format(delay=0, stop=False), columns=30)
    assert screen.shown == ["done"] and max(map(len, screen.most)) <= 30
