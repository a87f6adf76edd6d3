"""What the package tells people: reports of losses, reasons, places in their code, warnings.

- `reasons`: every sentence about why a loss is left alone, with its advice.
- `report`: the record of one loss. `log` keeps the records and passes them on.
- `notice`: warnings of large losses that were left alone.
- `location` and `sizes`: how nodes and tensors are written in a sentence.
"""
