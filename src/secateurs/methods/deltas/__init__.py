"""Methods that make the difference of a fine-tuned model to its base small."""
