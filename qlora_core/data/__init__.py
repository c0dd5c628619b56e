"""From examples to batches: tokens and blocks (encode), tensors (collate)."""
