"""What pathprune raises. Every message names the value, the limit and the remedy."""


class PathpruneError(Exception):
    """The base of every error that pathprune raises on bad input."""


class UnsupportedModelError(PathpruneError):
    """No prunable pair could be proved in the model; the message lists what was found and why it was refused."""


class DataError(PathpruneError):
    """The data is empty, has the wrong keys, or gives a loss that is not a finite number."""


class SettingError(PathpruneError, ValueError):
    """A setting that does not exist, or whose value is out of range."""


class BudgetError(PathpruneError):
    """A budget that no selection of this path can meet, or that is not a budget."""


class MismatchError(PathpruneError):
    """A path, a selection or a checkpoint belongs to another model."""


class ArtifactError(PathpruneError):
    """A file on disk is missing, truncated, malformed, or could not be written."""
