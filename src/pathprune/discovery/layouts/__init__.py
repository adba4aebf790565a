"""Layouts: the names and shapes by which sublayers are recognised. A candidate is proved before it counts."""
