"""`privet completion`: the script that teaches a shell the commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(*, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash    eval "$(privet completion bash)"         in ~/.bashrc
    zsh     eval "$(privet completion zsh)"          in ~/.zshrc
    fish    privet completion fish | source          in ~/.config/fish/config.fish
    """  # noqa: D301  the escape is click's mark for text that keeps its lines
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    print(kind(root, {}, "privet", "_PRIVET_COMPLETE").source())
