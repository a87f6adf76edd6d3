"""What the package tells people: reports of losses, reasons, places in their source, notices."""
