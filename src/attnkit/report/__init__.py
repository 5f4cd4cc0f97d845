"""What a run of ``attnkit compare`` found, for the terminal, as sentences, and as one HTML file.

Everything here is made from the JSON lines of the run and nothing else.
"""

from attnkit.report.html import write_html
from attnkit.report.picture import picture
from attnkit.report.table import kernel_table, pictures, table
from attnkit.report.words import paragraphs

__all__ = ["kernel_table", "paragraphs", "picture", "pictures", "table", "write_html"]
