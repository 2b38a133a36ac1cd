"""What single latents are: firings, texts, effects on the logits, neighbours, maps."""
