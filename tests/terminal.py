"""A command as a person at a terminal sees it: a real pseudo-terminal of some width."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios

from tests.process import environment_of

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


async def at_terminal(*arguments: str, columns: int = 80, **environ: str) -> tuple[int, str]:
    """Run `python -m bon_scheduler …` at a terminal; return its status and what was shown, without escapes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**environment_of(environ), "TERM": "xterm"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bon_scheduler", *arguments, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    reading = asyncio.create_task(asyncio.to_thread(_read_all, ours))
    async with asyncio.timeout(90):
        status = await process.wait()
        text = await reading
    return status, _ESCAPES.sub("", text).replace("\r\n", "\n")


def _read_all(terminal: int) -> str:
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError:
        pass  # the other side is closed
    os.close(terminal)
    return b"".join(parts).decode()
