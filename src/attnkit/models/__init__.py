"""Small language models that differ only in the attention layer put into them."""
