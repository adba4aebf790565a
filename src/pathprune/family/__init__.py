"""What a family of models is made of: pairs, their order, budgets, selections, and the path on disk. Numpy only."""
