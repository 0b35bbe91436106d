"""Random access to archives of images: WebDataset tars and zips."""

import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from core.errors import UserError
from models.runtime.image_files import IMAGE_SUFFIXES, suffix_of, why_not_image

TEXT_SUFFIXES = (".txt", ".json")
Members = dict[str, tarfile.TarInfo]
"""Lower-case suffix → member."""


class Tar:
    """Random access to a WebDataset tar; members with equal names up to the file name's first dot are one sample.

    Two kinds of tars that others write keep all of their samples, too. Names with dots: of 22.05.png, 22.05.txt,
    22.06.png and 22.06.txt, each image that has a text of its name up to the last dot is a sample. Repeated members:
    the samples' keys end in ~2, ~3, …. Where each member of a name comes equally often, those that come for the n-th
    time are the n-th sample; else a new sample begins where a member comes again.

    Raises:
        tarfile.TarError: the file is not a tar, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        groups: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
        self.left_out: list[tuple[str, str]] = []
        """Name and reason of each member that belongs to no sample."""
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isfile():
                    self.left_out.append((member.name, "link" if member.issym() or member.islnk() else "not a file"))
                    continue
                if why_not_image(member.name) == "system file":
                    self.left_out.append((member.name, "system file"))
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffixes = name.partition(".")
                last = suffix_of(f"name.{suffixes}")
                suffix = f".{suffixes}"[: -len(last) or None] + last
                groups.setdefault(f"{folder}/{stem}".lstrip("/"), []).append((suffix, member))
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself raises no error there
                raise tarfile.ReadError(f"no end mark at {tar.offset}")
        self.samples: dict[str, Members] = {}
        """Key → its members by suffix."""
        for key, group in groups.items():
            for number, members in enumerate(_repeats(group), 1):
                samples, left_out = _split_dotted(members)
                self.left_out += left_out
                for stem, sample in samples.items():
                    name = f"{key}{stem}" if number == 1 else f"{key}{stem}~{number}"
                    while name in self.samples:
                        name += "~"
                    self.samples[name] = sample
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

    def image(self, name: str) -> bytes | None:
        """Return the bytes of the member key.suffix; None if the tar has none."""
        key, dot, suffix = name.rpartition(".")
        member = self.samples.get(key, {}).get(f"{dot}{suffix}".lower())
        return None if member is None else self.read(member)


def _repeats(group: list[tuple[str, tarfile.TarInfo]]) -> list[Members]:
    """Split members that share a name, by suffix in the tar's order, into those of the first sample, the second, …."""
    counts: dict[str, Counter[str]] = {}  # of the suffixes that share a name up to the last dot
    for suffix, _ in group:
        counts.setdefault(suffix.rpartition(".")[0], Counter())[suffix] += 1
    equally_often = all(len(set(of_name.values())) == 1 for of_name in counts.values())
    repeats: list[Members] = [{}]
    for suffix, member in group:
        target = next((m for m in repeats if suffix not in m), None) if equally_often else repeats[-1]
        if target is None or suffix in target:
            target = {}
            repeats.append(target)
        target[suffix] = member
    return repeats


def _split_dotted(members: Members) -> tuple[dict[str, Members], list[tuple[str, str]]]:
    """Find the samples among the members of one name up to its first dot, and the images that belong to no sample.

    The first result maps the part of a sample's name after the first dot, such as ".05" or "", to its members; the
    second lists the name and reason of each such image.
    """
    dotted: dict[str, Members] = {}
    for suffix, member in members.items():
        last = suffix_of(f"name{suffix}")
        if last in IMAGE_SUFFIXES + TEXT_SUFFIXES and suffix != last:
            dotted.setdefault(suffix.removesuffix(last), {})[last] = member
    dotted = {stem: m for stem, m in dotted.items() if _first(m, IMAGE_SUFFIXES) and _first(m, TEXT_SUFFIXES)}
    sample_names = {f"{stem}{last}" for stem, sample in dotted.items() for last in sample}
    undotted = {suffix: member for suffix, member in members.items() if suffix not in sample_names}
    images = [suffix for suffix in undotted if suffix_of(f"name{suffix}") in IMAGE_SUFFIXES]
    image, text = _first(undotted, IMAGE_SUFFIXES), _first(undotted, TEXT_SUFFIXES)
    if image is None and text is not None and len(images) == 1:  # such as 0001.rgb.png with 0001.txt
        image = images[0]
        undotted[suffix_of(f"name{image}")] = undotted.pop(image)
    reason = "further image of a sample" if image else "image without a text of its name"
    left_out = [(members[suffix].name, reason) for suffix in images if suffix != image]
    if undotted and (image or text or not (dotted or images)):
        return {"": undotted, **dotted}, left_out
    return dotted, left_out


def _first(members: Members, suffixes: tuple[str, ...]) -> str | None:
    return next((suffix for suffix in suffixes if suffix in members), None)


class Zip(zipfile.ZipFile):
    """Random access to a zip of images by file name, whatever their folders.

    Raises:
        zipfile.BadZipFile: the file is not a zip, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._named: dict[str, list[zipfile.ZipInfo]] = {}
        for member in self.infolist():
            self._named.setdefault(member.filename.rpartition("/")[2], []).append(member)

    def image(self, name: str) -> bytes | None:
        """Return the bytes of the file of that name in any folder; None if there is none, if several differ, or if its
        checksum does not match."""
        members = self._named.get(name, [])
        if len({(member.CRC, member.file_size) for member in members}) != 1:
            return None
        try:
            return self.read(members[0])
        except (zipfile.BadZipFile, zlib.error, EOFError):
            return None


def opened(path: Path) -> Tar | Zip:
    """Open an archive by its suffix, .zip or .tar.

    Raises:
        UserError: the file is truncated or not an archive.
    """
    try:
        return Zip(path) if path.suffix == ".zip" else Tar(path)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        kind = path.suffix.removeprefix(".")
        raise UserError(
            f"{path} is truncated or not a {kind}: {error}; remove it, and run the same command again"
        ) from error
