"""The demos: three trainings with a known fault, each a YAML in `configs/` with its expected cause."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """One training that goes wrong."""

    name: str
    """Its name on the command line and of its folder; the YAML is `demo_<name>.yaml`."""
    title: str
    """The training and its fault, in one line."""
    expected: str
    """The cause that the report must put first."""

    @property
    def config(self) -> Path:
        """The YAML for `SpikeCLI`."""
        return configs_folder() / f"demo_{self.name}.yaml"

    def arguments(self, folder: Path) -> list[str]:
        """Return the command line for `SpikeCLI` that runs the demo and writes everything below `folder`."""
        return ["fit", f"--config={self.config}", f"--trainer.default_root_dir={folder}", f"--spike.dirpath={folder}"]


DEMOS: Final[tuple[Demo, ...]] = (
    Demo(
        name="digits_restarts",
        title="Digits, a small CNN, cosine warm restarts that come back up too high",
        expected="lr_restart",
    ),
    Demo(
        name="bytes_corrupt",
        title="Python source, a byte-level Transformer, three corrupt files",
        expected="bad_batch",
    ),
    Demo(
        name="digits_overfit",
        title="80 digits, the same CNN, trained until it knows them by heart",
        expected="overfitting",
    ),
)
"""In the order in which they are run."""


def configs_folder() -> Path:
    """Return the folder of the example YAMLs: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
