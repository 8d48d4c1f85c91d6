"""Builds the Dockerfile without a daemon and without a registry of images, and runs it: Debian 12, root.

The base is a Debian of mmdebstrap's, handed over as BASE_IMAGE; buildah builds (chroot isolation), podman and runc run.
``python -m tests.slurm.image FOLDER [COMMAND ...]`` does it by hand; FOLDER keeps base and layers for the next time.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("buildah", "podman", "mmdebstrap", "runc")
BASE, IMAGE = "localhost/base:check", "localhost/nemo_llm:check"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# Limits that podman asks for by itself need a capability that machines in containers lack.
_PODMAN = """\
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=30000:30000"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


def what_is_missing() -> str | None:
    """Why images cannot be built here; None where they can."""
    if os.geteuid() != 0:
        return "building images without a daemon needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)} (Debian's packages of the same names)" if missing else None


class ImageStore:
    """Images in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "containers.conf").write_text(_PODMAN)
        self._environment = os.environ | {"CONTAINERS_CONF": str(self._folder / "containers.conf")}
        # Where this machine's pip finds wheels on disk and whom it trusts, the build does too.
        found = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
        )
        wheels = Path(found.stdout.strip() or "/nowhere")
        self._wheels = [f"--volume={wheels}:/wheels:ro"] if wheels.is_dir() else []

    def _call(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        store = ["--root", f"{self._folder}/root", "--runroot", f"{self._folder}/run", "--storage-driver", "overlay"]
        done = subprocess.run(
            [program, *store, *arguments], env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done

    def build(self) -> None:
        """Make the base where it is not there yet, and the image from the Dockerfile; AssertionError with the log."""
        if self._call("podman", "image", "exists", BASE).returncode != 0:
            self._make_base()
        arguments = ["--isolation", "chroot", "--network", "host", *self._wheels, "--layers"]
        done = self._call("buildah", "bud", *arguments, "--build-arg", f"BASE_IMAGE={BASE}", "-t", IMAGE, str(ROOT))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def _make_base(self) -> None:
        archive = self._folder / "base.tar"
        trust = f'cat {_CERTIFICATES} >"$1"{_CERTIFICATES}'
        packages = "--include=ca-certificates,python3,python3-venv,python3-pip"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", packages, f"--customize-hook={trust}", "bookworm"]
        subprocess.run([*command, str(archive)], check=True, capture_output=True)
        settings = (f"PIP_CERT={_CERTIFICATES}", f"SSL_CERT_FILE={_CERTIFICATES}", "PIP_FIND_LINKS=/wheels")
        changes = [f"--change=ENV={setting}" for setting in settings]
        done = self._call("podman", "import", "-q", *changes, str(archive), BASE)
        archive.unlink()
        assert done.returncode == 0, done.stderr

    def run(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        """Run a command in the image, or what the image does by itself."""
        return self._call("podman", "run", "--rm", "--network", "host", "--pull", "never", *options, IMAGE, *command)

    def mount(self) -> Path:
        """The image's root file system as a folder."""
        done = self._call("podman", "image", "mount", IMAGE)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())


def main() -> int:
    """Build, and run what is asked for."""
    if (why := what_is_missing()) is not None:
        print(why, file=sys.stderr)
        return 2
    store = ImageStore(Path(sys.argv[1]))
    store.build()
    done = store.run(*sys.argv[2:])
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
