"""A module whose parameters have other names outside than inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["RenameParamsMixin"]


class RenameParamsMixin:
    """Registers parameters of a module under new names, which its `state_dict` then has alone.

    Put it before `nn.Module` among the bases, and call `set_rename_map` in `__init__`, after the parameters are there.

    Example:
        >>> class Scale(RenameParamsMixin, nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.w = nn.Parameter(Tensor([1.0]))
        ...         self.set_rename_map({"w": "scale"})
        >>> list(Scale().state_dict())
        ['scale']
    """

    old_to_new: Mapping[str, str]
    new_to_old: Mapping[str, str]

    def set_rename_map(self: Any, rename_map: Mapping[str, str]) -> None:
        """Renames parameters, from now on and those that come later.

        Args:
            rename_map: the new name of each old one, one to one; an old name may lie in a part, as `cell.weight`.
        """
        self.old_to_new = dict(rename_map)
        self.new_to_old = {new: old for old, new in rename_map.items()}
        self._register_state_dict_hook(_without_old_names)
        self._rename()

    def _rename(self: Any) -> None:
        for name, parameter in list(self.named_parameters()):
            if name in self.old_to_new:
                self.register_parameter(self.old_to_new[name], parameter)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        """Sets an attribute; a parameter with an old name, or a part that holds one, is renamed at once."""
        nn.Module.__setattr__(self, name, value)
        if isinstance(value, nn.Parameter | nn.Module) and "old_to_new" in self.__dict__:
            self._rename()

    def load_state_dict(self: Any, state_dict: Mapping[str, Tensor], strict: bool = True, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002 - torch's signature
        """Loads a state with the new names."""
        found = nn.Module.load_state_dict(self, state_dict, strict=False, **kwargs)
        found = type(found)([key for key in found.missing_keys if key not in self.old_to_new], found.unexpected_keys)
        if strict and (found.missing_keys or found.unexpected_keys):
            raise RuntimeError(
                f"the state does not fit {type(self).__name__}: it lacks {found.missing_keys} and has "
                f"{found.unexpected_keys} besides."
            )
        return found


def _without_old_names(module: Any, state: dict[str, Any], prefix: str, local: Any) -> dict[str, Any]:
    """Takes the old names out of a state."""
    for old in module.old_to_new:
        state.pop(prefix + old, None)
    return state
