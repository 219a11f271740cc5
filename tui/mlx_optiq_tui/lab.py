"""Find the dashboard from any of its widgets, typed; imports nothing of it, for it imports the widgets."""

from typing import TYPE_CHECKING, cast

from textual.message_pump import MessagePump

if TYPE_CHECKING:
    from mlx_optiq_tui.app import LabApp

__all__ = ["lab_of"]


def lab_of(node: MessagePump) -> "LabApp":
    """The app that a widget belongs to: its ``client``, ``jobs``, ``status``, ``connection``, ``is_demo``."""
    return cast("LabApp", node.app)
