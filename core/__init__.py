"""The model, its losses and the training engine."""
