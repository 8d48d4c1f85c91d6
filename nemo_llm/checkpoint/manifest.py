"""The manifest of a checkpoint: size and hashes of every file, made while writing, compared before reading. No torch.

The hash is XXH3 with 128 bits (xxhash): at memory speed it finds truncation, flipped bits and mixed-up files, which is
what disks and networks do. It is no signature: who can write the files can write the manifest. Files are hashed in
blocks, so that a check can take a sample of a large one.
"""

import json
import os
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal

import xxhash

from nemo_llm import __version__
from nemo_llm.errors import CheckpointDamagedError, CheckpointRefusedError

SCHEMA = 2
BLOCK_BYTES = 32 << 20
MANIFEST_FILE_NAME = "manifest.json"
COMPLETE = "COMPLETE"

Verification = Literal["full", "sampled", "sizes"]

_THREADS = 4
_READ_BYTES = 4 << 20
_SAMPLED_BLOCKS = 2
"""Blocks that ``sampled`` reads of each file, beside the first."""


class BlockHasher:
    """Hash of each block of `BLOCK_BYTES` of what passes through; large updates release Python's global lock."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.num_bytes = 0
        self._hash = xxhash.xxh3_128()
        self._room = BLOCK_BYTES

    def update(self, data: Any) -> None:
        """Take in the next bytes of the file."""
        view = memoryview(data).cast("B")
        self.num_bytes += len(view)
        while len(view):
            part = view[: self._room]
            self._hash.update(part)
            view, self._room = view[len(part) :], self._room - len(part)
            if not self._room:
                self._close_block()

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this file."""
        if self._room < BLOCK_BYTES:
            self._close_block()
        return {"bytes": self.num_bytes, "blocks": self.blocks}

    def _close_block(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash, self._room = xxhash.xxh3_128(), BLOCK_BYTES


def describe_file(path: Path) -> dict[str, Any]:
    """Manifest entry of a file that lies on the disk."""
    hasher = BlockHasher()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
    return hasher.entry()


def write_manifest(folder: Path, known: dict[str, dict[str, Any]]) -> list[Path]:
    """Write the manifest of all files under ``folder``; returns the files, the manifest among them.

    Args:
        known: entries, by relative name, of files that were hashed while they were written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    entries = {name: known.get(name) or describe_file(path) for name, path in names.items()}
    about = {"schema": SCHEMA, "version": __version__, "block_bytes": BLOCK_BYTES, "hash": "xxh3_128"}
    manifest = folder / MANIFEST_FILE_NAME
    manifest.write_text(json.dumps({**about, "files": entries}, indent=1))
    return [*files, manifest]


def manifest_digest(folder: Path) -> str:
    """What ``COMPLETE`` says of the manifest."""
    return xxhash.xxh3_128((folder / MANIFEST_FILE_NAME).read_bytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointDamagedError: it is missing, or does not agree with ``COMPLETE``.
        CheckpointRefusedError: a newer version wrote it.
    """
    path = folder / MANIFEST_FILE_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except FileNotFoundError:
        raise CheckpointDamagedError(f"{path}: missing") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path}: damaged; not readable as a manifest ({error})") from None
    if schema not in (1, SCHEMA):
        writer = manifest.get("version", "which it does not name")
        raise CheckpointRefusedError(
            f"{folder}: written in format {schema} by a newer version of nemo_llm ({writer}); this version, "
            f"{__version__}, reads formats up to {SCHEMA}.\n      fix: use that version or a later one"
        )
    recorded = (folder / COMPLETE).read_text().strip() if (folder / COMPLETE).exists() else ""
    if schema == SCHEMA and recorded and recorded != manifest_digest(folder):
        raise CheckpointDamagedError(f"{path}: damaged; its hash differs from the one in {COMPLETE}")
    return manifest


def verify(folder: Path, how: Verification = "full", share: tuple[int, int] = (0, 1)) -> int:
    """Compare the files with the manifest; returns the bytes that were read.

    Args:
        how: ``full`` reads every byte, ``sampled`` some blocks of each file, ``sizes`` none.
        share: (number, count) of the ranks among which the files are divided.

    Raises:
        CheckpointDamagedError: names the first file that is missing or differs.
        CheckpointRefusedError: a newer version wrote the checkpoint.
    """
    manifest = read_manifest(folder)
    work = list(_checks(folder, manifest, how))[share[0] :: share[1]]
    with ThreadPoolExecutor(_THREADS) as pool:
        return sum(pool.map(lambda item: _read_and_check(*item), work))


def _checks(
    folder: Path, manifest: dict[str, Any], how: Verification
) -> Iterable[tuple[Path, dict[str, Any], list[int]]]:
    """(file, entry, blocks to read); sizes are compared here, before anything is read."""
    # Other blocks at each load, so that many loads see the whole file; the process' own state of random stays alone.
    choose = random.Random(os.urandom(8))
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointDamagedError(f"{path}: missing; the manifest lists it with {entry['bytes']} bytes")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointDamagedError(f"{path}: damaged; it has {size} bytes, the manifest says {entry['bytes']}")
        if manifest["schema"] == 1:
            yield path, entry, [0]
            continue
        blocks = list(range(len(entry["blocks"])))
        if how == "sampled" and len(blocks) > 1 + _SAMPLED_BLOCKS:
            blocks = [0, *choose.sample(blocks[1:], _SAMPLED_BLOCKS)]
        if how != "sizes":
            # Pieces of a large file are checked by several threads.
            yield from ((path, entry, blocks[at : at + 8]) for at in range(0, len(blocks), 8))


def _read_and_check(path: Path, entry: dict[str, Any], blocks: list[int]) -> int:
    try:
        return _check(path, entry, blocks)
    except OSError as error:  # a failing disk, another user's file: as good as damaged, and named
        raise CheckpointDamagedError(f"{path}: damaged; it cannot be read: {error.strerror or error}") from None


def _check(path: Path, entry: dict[str, Any], blocks: list[int]) -> int:
    if "sha256" in entry:  # format 1
        with path.open("rb") as file:
            if file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointDamagedError(f"{path}: damaged; its hash differs from the manifest's")
        return int(entry["bytes"])
    total = 0
    with path.open("rb") as file:
        for block in blocks:
            file.seek(block * BLOCK_BYTES)
            content = xxhash.xxh3_128()
            left = BLOCK_BYTES
            while left and (data := file.read(min(left, _READ_BYTES))):
                content.update(data)
                left, total = left - len(data), total + len(data)
            if content.hexdigest() != entry["blocks"][block]:
                raise CheckpointDamagedError(
                    f"{path}: damaged; the {BLOCK_BYTES >> 20} MiB from byte {block * BLOCK_BYTES} on differ from the "
                    "manifest's hash"
                )
    return total
