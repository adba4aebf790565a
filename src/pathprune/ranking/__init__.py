"""The search that ranks the units of a model."""
