"""Text and ids: tokenizers as checkpoints bring them, chat templates, both written out again."""
