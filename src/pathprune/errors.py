"""What pathprune raises. Every message names the value, the limit and the remedy."""


class PathpruneError(Exception):
    """The base of every error that pathprune raises on bad input.

    Example:
        >>> issubclass(pp.BudgetError, pp.PathpruneError)
        True
    """


class UnsupportedModelError(PathpruneError):
    """No prunable pair could be proved in the model; the message lists what was found and why it was refused.

    Example:
        >>> pp.find_pairs(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})
        Traceback (most recent call last):
        pathprune.errors.UnsupportedModelError: Linear: no attention or MLP in a known layout ...
    """


class DataError(PathpruneError):
    """The data is empty, has the wrong keys, or gives a loss that is not a finite number.

    Example:
        >>> pp.search(model, [], steps=20)
        Traceback (most recent call last):
        pathprune.errors.DataError: ...
    """


class SettingError(PathpruneError, ValueError):
    """A setting that does not exist, or whose value is out of range.

    Example:
        >>> pp.search(model, batches, steps=1)
        Traceback (most recent call last):
        pathprune.errors.SettingError: steps=1 must be an integer, at least 3: ...
    """


class BudgetError(PathpruneError):
    """A budget that no selection of this path can meet, or that is not a budget.

    Example:
        >>> pp.Budget(keep=1.5)
        Traceback (most recent call last):
        pathprune.errors.BudgetError: keep=1.5 is not in (0, 1]; a float is the fraction kept
    """


class MismatchError(PathpruneError):
    """A path, a selection or a checkpoint belongs to another model.

    Example:
        >>> pp.slice_model(AutoModel.from_config(model.config), path.select(pp.Budget(keep=0.5)))
        Traceback (most recent call last):
        pathprune.errors.MismatchError: this path belongs to another model: weights was ...
    """


class ArtifactError(PathpruneError):
    """A file on disk is missing, truncated, malformed, or could not be written.

    Example:
        >>> pp.SolutionPath.load(folder / "nothing")
        Traceback (most recent call last):
        pathprune.errors.ArtifactError: ...
    """
