"""Callbacks for Lightning and their Hugging Face Trainer and TRL twins."""
