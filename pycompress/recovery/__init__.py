"""Recovery fine-tuning of compressed models."""
