"""Text: the tokenizer and CLIP's text embeddings."""
