"""Models read by role: where they come from, what sits where in them, and how they are run."""
