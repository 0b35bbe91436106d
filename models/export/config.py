"""Settings of `python -m models.export` (conf/export.yaml)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.export.model_card import CardDetails
from models.export.upload import address_problems
from models.export.wheels import target_problems


@dataclass(frozen=True)
class WheelsSettings:
    """Wheels collected for a machine without network."""

    python: str | float | None
    """Python version of the machine that predicts, such as 3.11; null: no wheels."""
    platform: str
    """Platform of the machine that predicts, such as manylinux_2_28_x86_64."""

    def version(self) -> str:
        """Python version as text; YAML reads 3.10 as the number 3.1."""
        return "3.10" if self.python == 3.1 else str(self.python)

    def validate(self) -> list[str]:
        return target_problems(self.version(), self.platform) if self.python is not None else []

    def unused(self) -> dict[str, str]:
        return {} if self.python is not None else {"platform": "without wheels.python: no wheels are collected"}


@dataclass(frozen=True)
class ExportSettings:
    """Settings of `python -m models.export`."""

    checkpoint: Path | None
    """Folder of a checkpoint, a run or an ensemble; null takes the newest checkpoints/*/best."""
    out: Path
    """Bundle folder to write."""
    flip: bool
    """Average the vectors of each image and its mirror image."""
    sizes: tuple[int, ...]
    """Input sizes in pixels to average over; empty: the size of training."""
    precision: Literal["fp32", "fp16"]
    """Type of the stored weights."""
    runtimes: tuple[Literal["onnx", "openvino", "openvino_int8", "torch"], ...]
    """Kinds of exported models for other runtimes; each is checked against the network."""
    check_images: Path | None
    """Folder of images or of a dataset on which exported models are checked; null: the eight probe images."""
    wheels: WheelsSettings
    title: str | None
    """Title of the model card and of the Kaggle page; null: names of encoder and backbone."""
    licence: str | None
    """Licence of the weights by the hub's short name, such as apache-2.0; null: the card says that none was given."""
    author: str | None
    """Author named on the model card."""
    push: str | None
    """Where to upload: hub:USER/NAME or kaggle:USER/SLUG; null: nowhere."""
    dry_run: bool
    """Log what would be uploaded, and upload nothing."""
    public: bool
    """Make a new upload public."""

    def validate(self) -> list[str]:
        problems = address_problems(self.push) if self.push is not None else []
        if "openvino_int8" in self.runtimes and self.check_images is None:
            problems.append(
                "runtimes: openvino_int8 is calibrated and measured on images; name some hundreds, check_images=FOLDER"
            )
        if self.check_images is not None and not self.runtimes:
            problems.append(
                f"check_images: {self.check_images} are for exported models, and runtimes is empty; name some, "
                "'runtimes=[onnx]'"
            )
        if self.push is None and (self.public or not self.dry_run):
            problems.append(
                "public, dry_run: need push=, which is null; set push=hub:USER/NAME or push=kaggle:USER/SLUG"
            )
        return problems + self.card_details().validate()

    def unused(self) -> dict[str, str]:
        # dry_run=false without push= is refused by `validate`
        without_push = self.push is None and self.dry_run
        return {"dry_run": "without push: the bundle is written, and nothing is uploaded"} if without_push else {}

    def card_details(self) -> CardDetails:
        return CardDetails(self.title, self.licence, self.author)
