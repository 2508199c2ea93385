class DemoError(ValueError):
    """What the user can put right; the message is one line."""
