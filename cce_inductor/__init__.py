from .ops import row_statistics
