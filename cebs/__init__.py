"""What the stages share: prompts, catalogue, branches, negatives, losses, metrics."""
