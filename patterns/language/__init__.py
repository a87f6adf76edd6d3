"""What authors of rules import."""
