"""Command-line entry points: compose settings with Hydra, log, and report errors. Only this module imports Hydra.

A command is `command("datagen", run)`: Hydra composes `conf/datagen.yaml` with the command line, and `run` gets a plain
dict, which it converts with `core.settings.settings`.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.paths import ROOT
from core.renamed_settings import Override, refuse_old_names, refuse_old_names_in_files
from core.settings import Values, leaves

_NOISY = (
    "aiobotocore",
    "botocore",
    "faiss",  # it logs its instruction set
    "httpx",
    "httpx2",
    "httpcore",
    "matplotlib",
    "sentence_transformers",
    "timm",
    "transformers",
)


def compose(config_name: str, overrides: list[str], *, by_user: bool = False) -> dict[str, Any]:
    """Compose the settings of `python -m … OVERRIDES`, as plain values.

    Args:
        by_user: whether to record the overrides as the user's, so that `settings` refuses those without an effect.

    Raises:
        UserError: a key or a value has an old name.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    refuse_old_names(config_name, _parsed(overrides))
    GlobalHydra.instance().clear()  # a command may compose the settings of another, as train.runs does
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra_compose(config_name, overrides)
    refuse_old_names_in_files(config_name, _plain(composed, resolve=False))
    values = _plain(composed, resolve=True)
    return Values(values, _written(overrides)) if by_user else values


def _plain(composed: Any, *, resolve: bool) -> dict[str, Any]:
    """Convert composed settings to plain values; `${…}` stays as it is unless `resolve`."""
    from omegaconf import OmegaConf

    return typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=resolve))


def _parsed(arguments: Sequence[str]) -> list[Override]:
    """Parse the overrides among the arguments of a command; Hydra refuses other arguments later."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    parser, overrides = OverridesParser.create(), []
    for argument in (a for a in arguments if not a.startswith("-")):
        with contextlib.suppress(OverrideParseException):
            (override,) = parser.parse_overrides([argument])
            overrides.append(Override(override.key_or_group, override.value(), argument))
    return overrides


def defaults(config_name: str) -> dict[str, Any]:
    """Return the values of `conf/<config_name>.yaml`, a file without groups; ten times as fast as `compose`."""
    from omegaconf import OmegaConf

    values = _plain(OmegaConf.load(ROOT / "conf" / f"{config_name}.yaml"), resolve=True)
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def _written(overrides: Sequence[str]) -> set[str]:
    """Dotted keys that Hydra's overrides set to a value other than null and false; `{a: {b: 1}}` sets a.b."""
    values = {o.key: o.value for o in _parsed(overrides) if not o.text.startswith("~")}
    return {key for key, value in leaves(values) if value is not None and value is not False}


def command(config_name: str, run: Callable[[dict[str, Any]], int | None]) -> None:
    """Call `run` with the settings of `conf/<config_name>.yaml` and the command line, and exit with its code.

    A `UserError` is printed as one message and exits with 2; Ctrl-C exits with 130.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    _refuse_foreign_packages()
    try:
        refuse_old_names(config_name, _parsed(sys.argv[1:]))  # Hydra's own message would not name the new key
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    code = 0

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)
    def main(composed: Any) -> None:
        nonlocal code
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        for noisy in _NOISY:
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("huggingface_hub").propagate = False  # it has its own handler
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that are not used here
        try:
            unresolved = _plain(composed, resolve=False)
            refuse_old_names_in_files(config_name, unresolved)  # Hydra accepts any key of an experiment
            missing = ", ".join(f"{key}=…" for key, value in leaves(unresolved) if value == "???")
            if missing:
                raise UserError(f"missing on the command line: {missing}")
            values = Values(_plain(composed, resolve=True), _written(HydraConfig.get().overrides.task))
            code = run(values) or 0
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            code = 2
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: the same command resumes\n")
            code = 130

    main()
    sys.stderr.flush()
    sys.exit(code)


def _refuse_foreign_packages() -> None:
    """Exit if one of our packages, whose names are generic, would be imported from another project."""
    for name in ("core", "datagen", "models", "report", "train"):
        spec = importlib.util.find_spec(name)
        locations = [*(spec.submodule_search_locations or []), spec.origin] if spec else [None]
        folder = Path(locations[0]).resolve() if locations[0] else None
        if folder != ROOT / name:
            sys.exit(
                f"error: the package '{name}' comes from {folder}, not from {ROOT / name}.\n"
                f"Run from {ROOT}, or remove the other '{name}' from PYTHONPATH ({os.environ.get('PYTHONPATH', '')})."
            )
