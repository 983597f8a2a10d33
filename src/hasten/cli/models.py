"""From what a person names to a trained model: a run folder, or a folder in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from hasten.errors import RunError, printable


def model_folder(path: Path) -> Path:
    """Return the folder of the trained model that `path` names.

    Raises:
        RunError: there is none; a run that is not finished has checkpoints only.
    """
    for folder in (path / "final", path):
        if (folder / "config.json").is_file():
            return folder
    shown = printable(str(path))
    if (path / "checkpoints").is_dir():
        raise RunError(
            f"The run {shown} is not finished; finish it with its own command, or take what it has so far: "
            f"hasten export {shown} --to FOLDER."
        )
    raise RunError(f"There is no trained model in {shown}; give a run folder or a folder with a config.json.")
