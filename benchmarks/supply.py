"""`make audit` and `make canary`: the pins against known vulnerabilities, and the newest versions against the pins."""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

from src import runs


def pins() -> dict[str, str]:
    """{package: version} of requirements.txt."""
    lines = (runs.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(
        re.fullmatch(r"([\w.-]+)==(\S+)", line.split("#")[0].strip()).groups() for line in lines if "==" in line
    )


def environment(name: str, packages: list[str]) -> Path:
    """The python of the virtual environment of that name (git ignores it), with the packages, as new as they can be."""
    folder = runs.ROOT / name
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install(python, ["--upgrade", *packages])
    return python


def install(python: Path, packages: list[str]):
    command = [python, "-m", "pip", "install", "-qqq", "--disable-pip-version-check", *packages]
    subprocess.run(command, check=True)


def audit() -> int:
    """Ask PyPI's advisories, then OSV, about every installed package. 1: something is known; 2: nobody answered."""
    python = environment(".audit", ["pip-audit"])
    installed = next(Path(sys.prefix).glob("lib/python*/site-packages"))
    for service in ("pypi", "osv"):
        options = ["--format", "json", "--progress-spinner", "off", "--vulnerability-service", service]
        command = [python, "-m", "pip_audit", "--path", installed, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            packages = json.loads(done.stdout)["dependencies"]
        except ValueError:  # it ended before it had an answer
            continue
        asked = [package for package in packages if "skip_reason" not in package]
        if asked:
            known = [(p["name"], p["version"], v["id"], v.get("fix_versions")) for p in asked for v in p["vulns"]]
            for name, version, advisory, fixed in known:
                print(f"{name} {version}: {advisory}, mended in {', '.join(fixed) or 'no version'}")
            print(
                f"{service} answered for {len(asked)} of {len(packages)} packages: {len(known)} known vulnerabilities"
            )
            return int(bool(known))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    print(f"Nothing was audited: neither pypi's advisories nor osv can be reached from this machine. {last}")
    return 2


def failing(python: Path, tests: list[str]) -> set[str]:
    """The tests that do not pass there."""
    done = subprocess.run([python, "-m", "pytest", "-q", *tests], cwd=runs.ROOT, capture_output=True, text=True)
    found = set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M))
    return found or ({"pytest itself"} if done.returncode else set())


def blame(broken: set[str], newer: dict[str, tuple[str, str]], fails) -> dict[str, set[str]]:
    """{package: the tests that pass again once it alone goes back to its pin}; "" for those that no single one mends.

    newer: {package: (its pin, the newest)}. fails: (package, its pin) to the tests of `broken` that fail with it.
    """
    found, left = {}, set(broken)
    for package, (pin, _) in newer.items():
        mended = left - fails(package, pin)
        if mended:
            found[package], left = mended, left - mended
    return found | ({"": left} if left else {})


def canary(tests: list[str]) -> int:
    """Run the tests with the pins, as the control, and with the newest versions; say which library breaks what."""
    control = failing(Path(sys.executable), tests)
    python = environment(".canary", list(pins()))
    code = "import importlib.metadata as m, sys\nfor name in sys.argv[1:]: print(name, m.version(name))"
    listed = subprocess.run([python, "-c", code, *pins()], capture_output=True, text=True, check=True).stdout
    newest = dict(line.split() for line in listed.splitlines())
    newer = {name: (pin, newest[name]) for name, pin in pins().items() if newest[name] != pin}
    print("newer than the pins:", ", ".join(f"{n} {a} -> {b}" for n, (a, b) in newer.items()) or "nothing")
    broken = failing(python, tests) - control

    def fails(package: str, pin: str) -> set[str]:
        install(python, [f"{package}=={pin}"])
        still = failing(python, sorted(broken))
        install(python, [f"{package}=={newest[package]}"])
        return still

    print(f"{len(control)} test(s) fail with the pins, {len(broken)} more with the newest versions")
    for package, names in (blame(broken, newer, fails) if broken else {}).items():
        which = f"{package} {newer[package][1]}" if package else "no single library"
        print(f"{which} breaks {', '.join(sorted(names))}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit({"audit": audit, "canary": lambda: canary(sys.argv[2:])}[sys.argv[1]]())
