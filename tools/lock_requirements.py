"""Write requirements/lock-py3XX.txt: the exact versions that pip resolves for every extra that needs no GPU.

    python tools/lock_requirements.py            # for the Python that runs it; run it once with each supported one

Nothing is installed. The result is a constraints file: `pip install -c requirements/lock-py311.txt -e '.[test]'`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "test,wandb"
HEADER = """\
# Versions that resolve together on Python {version}, for nemo_llm[{extras}]. Made by tools/lock_requirements.py.
# Use: pip install -c requirements/{name} -e '.[test]'
"""


def resolve(extras: str) -> list[tuple[str, str]]:
    """Names and versions that pip would install into an empty environment, sorted by name, nemo_llm itself left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), f"{ROOT}[{extras}]"], check=True)
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    # A local part such as 2.13.0+cpu names one build of a release; a lock that names it fits one registry only.
    pins = {normal(each["name"]): each["version"].partition("+")[0] for each in found}
    del pins["nemo-llm"]
    return sorted(pins.items())


def normal(name: str) -> str:
    """`name` as package registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Resolve, and write the lock file of the running Python."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = ROOT / "requirements" / f"lock-py{version.replace('.', '')}.txt"
    pins = resolve(EXTRAS)
    target.parent.mkdir(exist_ok=True)
    lines = [f"{name}=={pinned}\n" for name, pinned in pins]
    target.write_text(HEADER.format(version=version, extras=EXTRAS, name=target.name) + "".join(lines))
    print(f"{target.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
