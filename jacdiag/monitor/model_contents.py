"""Whether a model has other modules or parameters than at the last look."""

from __future__ import annotations

from torch import nn


class ModelContents:
    """The modules and the parameters of a model, by their identity.

    A walk through all modules takes as long as an optimizer needs for thirty small weights. So the
    modules of the last walk are compared by what they hold, which takes a tenth of that.

    Args:
        model: the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> contents = ModelContents(model)
        >>> contents.have_changed()
        False
        >>> model[1] = nn.Linear(2, 2)
        >>> contents.have_changed(), contents.have_changed()
        (True, False)
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the model for the first time; see the class for the arguments."""
        self._model = model
        self._walk()

    def have_changed(self) -> bool:
        """Return whether the model holds other modules or parameters than at the last call."""
        if self._read() == self._last:
            return False
        self._walk()
        return True

    def _walk(self) -> None:
        """Walk through all modules, and note what each of them holds."""
        self._modules = list(self._model.modules())
        self._last = self._read()

    def _read(self) -> list[int]:
        """Return the identities of all parameters and modules, module by module."""
        identities: list[int] = []
        for module in self._modules:
            identities += map(id, module._parameters.values())
            identities += map(id, module._modules.values())
            # Otherwise a parameter could move to the next module unseen.
            identities.append(len(module._parameters))
        return identities
