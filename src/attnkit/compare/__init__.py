"""``attnkit compare``: train and time models that differ only in their attention."""
