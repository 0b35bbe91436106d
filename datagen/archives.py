"""Archives of pictures, read at random: WebDataset tars and zips."""

import tarfile
import zipfile
import zlib
from pathlib import Path

from conf import UserError


class Tar:
    """A WebDataset tar: a sample is the members that share a name up to the first dot of its last part.

    Raises:
        tarfile.TarError: it is none, or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        """Key → suffix, in small letters → member."""
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    self.samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f".{suffix.lower()}"] = member
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself ends there in silence
                raise tarfile.ReadError(f"no end mark at {tar.offset}")
        self._file = path.open("rb")

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, member: tarfile.TarInfo) -> bytes:
        self._file.seek(member.offset_data)
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise tarfile.ReadError(f"{member.name} ends early")
        return data

    def picture(self, name: str) -> bytes | None:
        """The member key.suffix; None where there is none."""
        key, dot, suffix = name.rpartition(".")
        member = self.samples.get(key, {}).get(f"{dot}{suffix}".lower())
        return None if member is None else self.read(member)


class Zip:
    """A zip of pictures, in folders or not.

    Raises:
        zipfile.BadZipFile: it is none, or cut off.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._members = {name.rpartition("/")[2]: name for name in self._zip.namelist()}

    def __enter__(self) -> "Zip":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def picture(self, name: str) -> bytes | None:
        """The file of that name, in whatever folder; None where there is none, or it does not match its checksum."""
        member = self._members.get(name)
        try:
            return None if member is None else self._zip.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            return None


def opened(path: Path) -> Tar | Zip:
    """
    Raises:
        UserError: the file is cut off, or no archive.
    """
    try:
        return Zip(path) if path.suffix == ".zip" else Tar(path)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        kind = path.suffix.removeprefix(".")
        raise UserError(
            f"{path} is cut off or no {kind}: {error}; remove it, and run the same command again"
        ) from error
