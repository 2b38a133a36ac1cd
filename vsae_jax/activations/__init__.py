"""Text through a language model to rows on disk, and back as shuffled rows."""
