"""One folder a mechanism; see ``attnkit.registry``."""
