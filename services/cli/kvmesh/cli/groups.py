"""Groups of commands, imported when one of theirs is called for: what they need takes long to load."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from typer.core import TyperGroup
from typer.main import get_group

# Name of a group -> the module whose `app` it is.
_MODULES = {
    "config": "kvmesh.cli.config_commands",
    "index": "kvmesh.cli.index_commands",
    "keys": "kvmesh.cli.key_commands",
    "router": "kvmesh.cli.router_replay",
    "kvbm": "kvmesh.cli.kvbm_commands",
}


class LazyGroups(TyperGroup):
    """The commands that are registered, and the groups."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(dict.fromkeys([*self.commands, *_MODULES]))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _MODULES and cmd_name not in self.commands:
            group = get_group(import_module(_MODULES[cmd_name]).app)
            group.name = cmd_name
            self.commands[cmd_name] = group
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.list_commands(ctx):
            # What was meant is looked for among those that are there.
            for name in _MODULES:
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)
