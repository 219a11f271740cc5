"""The screens of the dashboard by key: one line each.

A screen's module is imported when it is first opened; one that is not part of this installation is not
offered. Read by ``app``.
"""

import importlib
import importlib.util

import msgspec

from mlx_optiq_tui.lab_screen import LabScreen

__all__ = ["SCREENS", "ScreenEntry", "installed_screens"]


class ScreenEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One screen."""

    name: str
    """In code and on the command line."""
    title: str
    key: str
    """A digit; the function key of the same number works inside text fields too."""
    module: str
    """Dotted, below this package."""
    screen: str
    """Class of :class:`.LabScreen` in that module."""
    about: str
    """For the command palette and the help."""

    @property
    def dotted_module(self) -> str:
        """Full name of the module."""
        return f"mlx_optiq_tui.{self.module}"

    def make(self) -> LabScreen:
        """Import the module and make the screen."""
        made: LabScreen = getattr(importlib.import_module(self.dotted_module), self.screen)()
        return made


SCREENS: tuple[ScreenEntry, ...] = (
    ScreenEntry(
        name="monitor",
        title="Monitor",
        key="1",
        module="monitor.screen",
        screen="MonitorScreen",
        about="Requests, speed, memory, caches and the log of the server",
    ),
    ScreenEntry(
        name="adapters",
        title="Adapters",
        key="2",
        module="adapters.screen",
        screen="AdaptersScreen",
        about="Mount, unmount, choose and compare LoRA adapters",
    ),
    ScreenEntry(
        name="chat",
        title="Chat",
        key="3",
        module="chat.screen",
        screen="ChatScreen",
        about="Talk to the model, with images and tools",
    ),
    ScreenEntry(
        name="quantize",
        title="Quantize",
        key="4",
        module="quantize.screen",
        screen="QuantizeScreen",
        about="Measure a model, choose a budget, convert and score it",
    ),
    ScreenEntry(
        name="finetune",
        title="Fine-tune",
        key="5",
        module="finetune.screen",
        screen="FinetuneScreen",
        about="Write a dataset and train an adapter on it",
    ),
    ScreenEntry(
        name="integrations",
        title="Integrations",
        key="6",
        module="integrations.screen",
        screen="IntegrationsScreen",
        about="Connect coding agents and other clients to the server",
    ),
)


def installed_screens() -> tuple[ScreenEntry, ...]:
    """The screens whose module exists, found without importing it."""
    return tuple(entry for entry in SCREENS if _exists(entry.dotted_module))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
