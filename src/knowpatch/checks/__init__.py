"""Checks: whether an edited model still says what it must; what an edit may disturb; its health."""
