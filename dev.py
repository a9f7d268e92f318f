"""
One door for a fresh machine: `python3 dev.py demo`, `python3 dev.py test`, `python3 dev.py lint`,
`python3 dev.py COMMAND …`.

Makes `.venv` with the hashed requirements, once, and again when they change; then runs pytest or a
command of bon_scheduler in it. Needs Python 3.11 and nothing else. Uses uv where it is, pip where not.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST = (3, 11)
HELP = """\
Of a checkout:
  test         Run the tests; pytest's options may follow.
  lint         Check style, types and imports, as CI does.

All other commands are the program's:
"""


def _stop(why: str) -> None:
    sys.exit(f"dev.py: {why}")


def _install(requirements: Path) -> None:
    """Bring `.venv` to what `requirements` names, unless that is done and nothing has changed since."""
    stamp = VENV / f"installed-{requirements.stem}"
    # The tests' requirements include the demo's: both are looked at, in case that one alone is changed.
    texts = [path.read_bytes() for path in sorted({requirements.with_stem("demo"), requirements})]
    wanted = hashlib.sha256(b"".join([*texts, sys.version.encode()])).hexdigest()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing {requirements.name} into .venv …", file=sys.stderr, flush=True)
    uv = shutil.which("uv")
    if uv:
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, VENV], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", PYTHON, "-r", requirements], check=True)
    else:
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            _stop("this Python cannot make a virtual environment; install its venv package (python3-venv).")
        pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "--require-hashes", "-r", requirements], check=True)
    stamp.write_text(wanted)


def _lint() -> int:
    """Run every check of style, types and imports; return 0 when all pass."""
    checks = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"])
    return max(subprocess.run([PYTHON.with_name(tool), *rest], check=False).returncode for tool, *rest in checks)


def main() -> None:
    """Install what the command needs, then become it."""
    if sys.version_info < OLDEST:
        _stop(f"needs Python 3.11 or newer, this is {sys.version.split()[0]}; try: python3.11 dev.py …")
    command, *rest = sys.argv[1:] or ["--help"]
    # The tests' packages include the demo's: whoever has them needs no second environment.
    developing = command in {"test", "lint"} or (VENV / "installed-dev").exists()
    requirements = ROOT / "requirements" / ("dev.txt" if developing else "demo.txt")
    try:
        _install(requirements)
    except subprocess.CalledProcessError as error:
        _stop(f"could not install {requirements.name} (exit {error.returncode}); is PyPI reachable?")
    os.chdir(ROOT)
    if command == "lint":
        sys.exit(_lint())
    if command == "--help":
        print(HELP, flush=True)
    os.environ["BON_SCHEDULER_STARTED_AS"] = f"{Path(sys.executable).name} {sys.argv[0]}"  # what hints say to type
    module = ["pytest", *rest] if command == "test" else ["bon_scheduler", command, *rest]
    os.execv(PYTHON, [str(PYTHON), "-m", *module])


if __name__ == "__main__":
    main()
