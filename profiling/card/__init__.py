"""What needs a card: images per second, what fits under a cap, and the suite that measures all of it in short sessions."""
