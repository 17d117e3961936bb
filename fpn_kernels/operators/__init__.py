"""The torch operators, one folder each; `functional` imports them, and an import registers."""
