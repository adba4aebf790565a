"""A selection applied to a model: masks, slices, reconstruction."""
