"""What the notebooks share and what is not the lesson: data, frozen models, the training loop, metrics, pictures."""
