"""What a finished set is used for: transfer, prompts, merging, cost, publishing, the stock Trainer."""
