"""Transfer: bytes of a folder on object storage, asked for again when they do not come as they should.

Credentials are the provider's own affair: its environment variables, its files, the machine's role. None is taken from
a URL, and none is shown.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from hasten.errors import DamagedData, DataError, nearest, one_line, printable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Waits between tries, in seconds: one failure in twenty is over at the next try, an outage of a minute is sat out.
WAITS = (0.1, 0.3, 1.0, 3.0, 9.0, 25.0, 40.0)
# From this try on, whoever watches is told.
_HURTS = 4
REQUEST_SECONDS = 30.0
LONGEST_SECONDS = 120.0
PART_BYTES = 8 << 20

# Protocol -> what to install, where its credentials come from.
_PROVIDERS = {
    "s3": ("pip install 'hasten[s3]'", "AWS_PROFILE, AWS_ACCESS_KEY_ID or ~/.aws"),
    "gs": ("pip install gcsfs", "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS"),
    "hf": ("pip install huggingface_hub", "`hf auth login` or HF_TOKEN"),
    "az": ("pip install adlfs", "AZURE_STORAGE_CONNECTION_STRING or `az login`"),
    "file": ("pip install fsspec", "the file's permissions"),
    "memory": ("pip install fsspec", "nothing"),
}
_NAMES = {"s3a": "s3", "gcs": "gs", "abfs": "az"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": REQUEST_SECONDS,
            "max_pool_connections": 32,
        },
        "use_listings_cache": False,
    },
}
# Errors of the providers' libraries that say, in types of their own, that nobody is known to them.
_UNKNOWN_PERSON = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}
_UNKNOWN_PERSON |= {"CredentialRetrievalError", "TokenRetrievalError", "ProfileNotFound", "ClientAuthenticationError"}
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")

Tell = Callable[[str], None]
_Value = TypeVar("_Value")


def to_stderr(sentence: str) -> None:
    """Write a sentence for whoever watches."""
    print(f"hasten: {printable(sentence)}", file=sys.stderr, flush=True)


class NoSuchObject(DataError):
    """An object does not exist."""


class Remote:
    """A folder on object storage.

    May be used by several threads, and in a forked process, which opens the file system anew.

    Args:
        url: ``s3://bucket/folder``, or ``gs://``, ``hf://``, ``az://``, ``file://``, ``memory://``.
        tell: is given a sentence when the storage has failed several times in a row.

    Raises:
        DataError: no such protocol, credentials in the URL, or the package for it is not installed.

    Example:
        >>> remote = Remote("memory://example/data")
        >>> remote.write("a.txt", b"some bytes")
        >>> remote.read("a.txt", 5, 10)
        b'bytes'
    """

    def __init__(self, url: str, *, tell: Tell = to_stderr) -> None:
        protocol, _, rest = url.partition("://")
        self._provider = _NAMES.get(protocol, protocol)
        if ":" in rest.partition("/")[0].rpartition("@")[0] or "?" in rest:
            raise DataError(
                f"The {one_line(protocol, 20)}:// URL holds credentials or a query, which would end up in records: "
                f"give the plain URL; credentials are taken from {_credentials(self._provider)}."
            )
        if self._provider not in _PROVIDERS or not rest.strip("/"):
            known = ", ".join(f"{name}://" for name in _PROVIDERS)
            raise DataError(
                f"{one_line(url, 200)} is no URL of a folder that can be read{nearest(protocol, _PROVIDERS)}: give one "
                f"that begins with {known} and names the folder."
            )
        self.url = url.rstrip("/")
        self.tell, self._is_closing, self._opened = tell, threading.Event(), (-1, None, "")
        self._told_at = 0.0
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process opens the file system for itself."""
        return {**vars(self), "_opened": (-1, None, ""), "_is_closing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _is_closing=threading.Event())

    def close(self) -> None:
        """End every wait for another try; what waits then fails."""
        self._is_closing.set()

    def read(self, name: str, begin: int, end: int, check: Callable[[bytes], str] = lambda content: "") -> bytes:
        """Return the bytes from `begin` up to `end` of an object.

        Args:
            name: of the object within the folder.
            begin, end: ``0 <= begin < end``.
            check: says what is wrong with the bytes, or ``""``; wrong ones are asked for again.

        Raises:
            DamagedData: they came, and were wrong each time.
            NoSuchObject: there is no such object.
            DataError: they did not come in 8 tries or 2 minutes, or may not be read.
        """

        def once() -> bytes:
            content = self._content(name, begin, end)
            if len(content) != end - begin:
                raise _Wrong(f"{len(content):,} bytes came instead of {end - begin:,}")
            if fault := check(content):
                raise _Wrong(fault)
            return content

        return self._tried(once, f"{name}, bytes {begin:,} to {end:,}", name)

    def read_all(self, name: str, size: int, check: Callable[[bytes], str] = lambda content: "") -> bytes:
        """Return the `size` bytes of an object, in parts of 8 MiB; as `read`, but for what is wrong with the whole."""

        def once() -> bytes:
            parts = [self.read(name, begin, min(size, begin + PART_BYTES)) for begin in range(0, size, PART_BYTES)]
            content = b"".join(parts)
            if fault := check(content):
                raise _Wrong(fault)
            return content

        return self._tried(once, name, name, tries=3)

    def size(self, name: str) -> int:
        """Return the size of an object in bytes; errors as of `read`."""
        return self._tried(lambda: int(self._filesystem().info(self._path(name))["size"]), name, name)

    def sizes(self) -> dict[str, int] | None:
        """Return the sizes of all objects of the folder by name; None where listing is not permitted."""

        def once() -> dict[str, int] | None:
            try:
                self._filesystem().invalidate_cache()
                entries = self._filesystem().ls(self._path(""), detail=True)
            except PermissionError:
                return None
            return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

        return self._tried(once, "the list of its objects", "")

    def write(self, name: str, content: bytes | os.PathLike[str]) -> None:
        """Write an object: bytes, or the content of a local file; errors as of `read`."""

        def once() -> None:
            filesystem = self._filesystem()
            if self._provider == "file":
                filesystem.makedirs(self._path(""), exist_ok=True)
            if isinstance(content, bytes):
                filesystem.pipe_file(self._path(name), content)
            else:
                filesystem.put_file(os.fspath(content), self._path(name))

        self._tried(once, name, name)

    def where(self, name: str) -> str:
        """Return the URL of an object, for a message."""
        return printable(f"{self.url}/{name}" if name else self.url)

    def _content(self, name: str, begin: int, end: int) -> bytes:
        filesystem = self._filesystem()
        if not filesystem.async_impl:
            return filesystem.cat_file(self._path(name), start=begin, end=end)
        from fsspec.asyn import sync

        path = self._path(name)
        return sync(filesystem.loop, filesystem._cat_file, path, start=begin, end=end, timeout=REQUEST_SECONDS)

    def _path(self, name: str) -> str:
        self._filesystem()
        return f"{self._opened[2]}/{name}".rstrip("/")

    def _filesystem(self) -> AbstractFileSystem:
        if self._opened[0] != os.getpid():
            self._open()
        return self._opened[1]

    def _open(self) -> None:
        """Open the file system in this process: what another one opened has threads that are not here."""
        install = _PROVIDERS[self._provider][0]
        try:
            from fsspec.core import url_to_fs

            filesystem, path = url_to_fs(self.url, skip_instance_cache=True, **_OPTIONS.get(self._provider, {}))
        except ImportError:
            raise DataError(f"{self.where('')} needs a package that is not installed: {install}.") from None
        except Exception as error:
            raise DataError(f"{self.where('')} cannot be opened ({self._reason(error)}); check the URL.") from None
        if self._provider == "s3":
            filesystem.retries = 1  # tries are counted here, once
        self._opened = (os.getpid(), filesystem, path.rstrip("/"))

    def _tried(self, attempt: Callable[[], _Value], what: str, name: str, tries: int = len(WAITS) + 1) -> _Value:
        began = time.monotonic()
        for number in range(1, tries + 1):
            try:
                return attempt()
            except DataError:
                raise
            except Exception as error:
                self._refuse(error, name)
                failed = error
            wait = WAITS[min(number, len(WAITS)) - 1] * _jitter(self.url, what, number)
            if number == tries or time.monotonic() - began + wait > LONGEST_SECONDS:
                break
            if number >= _HURTS:
                self._complain(what, number, wait, failed)
            if self._is_closing.wait(wait):
                break
        where = f"{self.where(name)} ({printable(what)})" if what != name else self.where(name)
        if isinstance(failed, _Wrong):
            raise DamagedData(
                f"{where} is damaged: {failed}, at each of {number} tries; upload the prepared data again.", file=name
            )
        seconds = time.monotonic() - began
        raise DataError(
            f"{where} could not be read or written in {number} tries over {seconds:.0f} s "
            f"({self._reason(failed)}); when the storage answers again, give the same command to go on."
        )

    def _refuse(self, error: Exception, name: str) -> None:
        """Raise what another try would not change."""
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            raise NoSuchObject(
                f"{self.where(name)} does not exist; check the URL, and that the whole folder was uploaded."
            ) from None
        if isinstance(error, PermissionError) or type(error).__name__ in _UNKNOWN_PERSON:
            raise DataError(
                f"{self.where(name)} may not be accessed ({self._reason(error)}); give credentials that permit it, by "
                f"{_credentials(self._provider)}."
            ) from None
        if isinstance(error, ImportError):
            install = _PROVIDERS[self._provider][0]
            raise DataError(f"{self.where(name)} needs a package that is not installed: {install}.") from None

    def _complain(self, what: str, number: int, wait: float, error: Exception) -> None:
        if time.monotonic() - self._told_at < 30:  # one line for an outage, not one for each thread that meets it
            return
        self._told_at = time.monotonic()
        self.tell(
            f"{self.where('')}: {printable(what)} failed {number} times ({self._reason(error)}); "
            f"next try in {wait:.0f} s"
        )

    def _reason(self, error: Exception) -> str:
        """Return what an error says, without what could be a secret."""
        text = str(error).strip() or type(error).__name__
        for name in _SECRETS:
            if secret := os.environ.get(name):
                text = text.replace(secret, "...")
        text = re.sub(r"\?[^\s'\"]+", "?...", text)
        text = re.sub(r"(?i)\b(\w*(?:key|secret|token|signature|password)\w*)(['\"]?\s*[=:]\s*)\S+", r"\1\2...", text)
        return one_line(text, 200)


class _Wrong(Exception):
    """Bytes came, and are not those that were asked for."""


def _credentials(provider: str) -> str:
    return _PROVIDERS.get(provider, ("", "the provider's own environment variables and files"))[1]


def _jitter(*parts: object) -> float:
    """Return a factor from 0.5 to 1.5, another one for each process and object, the same at each call."""
    digest = hashlib.sha256(repr((os.getpid(), *parts)).encode()).digest()
    return 0.5 + int.from_bytes(digest[:4], "little") / 2**32
