"""How a model is trained: ranks, engine, loop, reports, and checkpoints written in the background."""
