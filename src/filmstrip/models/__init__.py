"""Models: weights, attention and what differs per family; knows tensors, not requests."""
