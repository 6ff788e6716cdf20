"""One run comes into being: the objective, the optimizer, the averages, the loop."""
